"""`python -m stages.train` with FSDP2 on processes without GPUs, which accelerate alone would run as DDP.

torchrun tests/fsdp_on_cpu.py name=value ...
"""

import sys

import torch
from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__


def forced(self, *args, fsdp_plugin=None, **kwargs):
    first = not AcceleratorState._shared_state
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


AcceleratorState.__init__ = forced


def main() -> int:
    from accelerate import Accelerator

    from stages.train import main

    prepare = Accelerator.prepare

    def told(self, *args, **kwargs):
        made = prepare(self, *args, **kwargs)
        sharded = sum(hasattr(p, "full_tensor") for p in made[0].parameters())
        print(f"fsdp2 {self.is_fsdp2}: {sharded} of {len(list(made[0].parameters()))} parameters sharded", flush=True)
        return made

    Accelerator.prepare = told
    torch.set_num_threads(1)
    return main()


if __name__ == "__main__":
    sys.exit(main())
