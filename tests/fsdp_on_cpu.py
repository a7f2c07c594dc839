"""`python -m stages.train` with FSDP2 on processes without GPUs, which accelerate alone would run as DDP.

torchrun tests/fsdp_on_cpu.py name=value ...
"""

import sys

import torch
from accelerate.state import AcceleratorState, DistributedType

plain = AcceleratorState.__init__
plugins = []


def forced(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    plugins.extend([fsdp_plugin] if fsdp_plugin is not None else [])
    if plugins:  # each further call takes the type over from the processes' own state again
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugins[0]


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
