"""The noised images that the teacher reads: drawn noise, DDIM inversion, or null-text inversion.

DDIM inversion: Song et al., "Denoising diffusion implicit models" (ICLR 2021), the deterministic sampler run backwards
from the image. Null-text inversion: Mokady et al., "Null-text inversion for editing real images" (CVPR 2023), which
then denoises with guidance and at each step optimises the embedding of the empty text so that the path back follows
the path out.
"""

from collections.abc import Callable, Iterator, Sequence

import torch

from pipeline.teacher.adapter import Adapter
from pipeline.teacher.capture import Capture
from pipeline.teacher.config import TeacherConfig, inversion_steps, nearest_steps
from pipeline.teacher.noise import draw_noise
from pipeline.teacher.text import Condition
from pipeline.teacher.unet import UNetAdapter

RATE = 1e-2  # of the optimiser at the first step, falling linearly to half
ENOUGH = 1e-5  # squared error at which a step is done, growing by TOLERANCE with every step
TOLERANCE = 2e-5


def readings(
    adapter: Adapter,
    cfg: TeacherConfig,
    latents_BCYX: torch.Tensor,
    seeds: Sequence[int],
    condition: Condition,
    capture: Capture,
) -> Iterator[None]:
    """Runs every forward that is read; yields after each, when `capture` has grown.

    Args:
        seeds: of the noise of each row, see `noise.image_seed`.
    """
    if cfg.inversion == "none":
        yield from _noised(adapter, cfg, latents_BCYX, seeds, condition, capture)
        return
    assert isinstance(adapter, UNetAdapter)
    path = Path(adapter, cfg.inversion_steps)
    wanted = nearest_steps(path.steps, cfg.timesteps)
    if cfg.inversion == "ddim":
        trail = path.out(latents_BCYX, condition, max(wanted) + 1)
        for number in sorted(wanted):
            adapter.forward(trail[number + 1], path.steps[number], condition, capture)
            yield
        return
    trail = path.out(latents_BCYX, condition, len(path.steps))
    empty = adapter.condition([""] * len(latents_BCYX))
    yield from _null_text(adapter, cfg, path, trail, wanted, condition, empty, capture)


def _noised(adapter, cfg, latents_BCYX, seeds, condition, capture) -> Iterator[None]:
    shape = tuple(latents_BCYX.shape[1:])
    for draw in range(cfg.draws):
        noise_BCYX = torch.stack([draw_noise(seed, draw, shape) for seed in seeds]).to(latents_BCYX.device)
        for timestep in cfg.timesteps:
            adapter.forward(adapter.noised(latents_BCYX, noise_BCYX, timestep), timestep, condition, capture)
            yield


class Path:
    """The steps of a deterministic sampler between the image and noise.

    Attributes:
        steps: the timesteps, ascending; the latents of step i lie between those of step i - 1 and i + 1.
    """

    def __init__(self, adapter: UNetAdapter, count: int):
        self.adapter = adapter
        self.steps = inversion_steps(count, len(adapter.alphas))

    def alpha(self, number: int) -> float:
        """Share of signal left after step `number`; -1 is the image itself."""
        return self.adapter.alphas[self.steps[number]].item() if number >= 0 else self.adapter.alphas[0].item()

    def out(self, latents_BCYX: torch.Tensor, condition: Condition, count: int) -> list[torch.Tensor]:
        """The latents of the image and after each of the first `count` steps, without guidance."""
        trail = [latents_BCYX]
        for number, timestep in enumerate(self.steps[:count]):
            here, there = self.alpha(number - 1), self.alpha(number)
            noise = self.adapter.predict(trail[-1], timestep, here, condition)
            trail.append(self.move(trail[-1], noise, here, there))
        return trail

    @staticmethod
    def move(latents: torch.Tensor, noise: torch.Tensor, here: float, there: float) -> torch.Tensor:
        """Latents with a share `here` of signal, carried to a share `there` along the predicted noise."""
        clean = (latents - (1 - here) ** 0.5 * noise) / here**0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * noise


def _null_text(
    adapter: UNetAdapter,
    cfg: TeacherConfig,
    path: Path,
    trail: list[torch.Tensor],
    wanted: set[int],
    condition: Condition,
    empty: Condition,
    capture: Capture,
) -> Iterator[None]:
    """Guided denoising from the end of the trail; the conditional forward of each wanted step is read. The last one
    of these leads nowhere any more, so it ends early."""
    latents, null_BTC = trail[-1], empty.hidden_BTC.float()
    count = len(path.steps)
    for back, number in enumerate(reversed(range(count))):
        timestep, here, there = path.steps[number], path.alpha(number), path.alpha(number - 1)
        if number == min(wanted):
            adapter.forward(latents, timestep, condition, capture)
            yield
            return
        noise = adapter.predict(latents, timestep, here, condition, capture=capture if number in wanted else None)

        def step(null: torch.Tensor, latents=latents, noise=noise, t=timestep, ends=(here, there)) -> torch.Tensor:
            plain = adapter.predict(latents, t, ends[0], empty, null)
            return path.move(latents, plain + cfg.guidance * (noise - plain), *ends)

        rate = RATE * (1 - back / (2 * count))
        null_BTC = _optimise(step, null_BTC, trail[number], rate, cfg.inner_steps, ENOUGH + back * TOLERANCE)
        latents = step(null_BTC)
        if number in wanted:
            yield


def _optimise(
    step: Callable[[torch.Tensor], torch.Tensor],
    null_BTC: torch.Tensor,
    target: torch.Tensor,
    rate: float,
    most: int,
    enough: float,
) -> torch.Tensor:
    """The embedding of the empty text that brings `step` nearest to the target. Rows do not touch each other: one that
    is good enough stays as it is while others go on."""
    with torch.enable_grad():
        null_BTC = null_BTC.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([null_BTC], lr=rate)
        done_B = torch.zeros(len(null_BTC), dtype=torch.bool, device=null_BTC.device)
        for _ in range(most):
            error_B = (step(null_BTC) - target).square().flatten(1).mean(1)
            done_B |= error_B.detach() < enough
            if done_B.all().item():
                break
            optimiser.zero_grad()
            error_B.sum().backward()
            before_BTC = null_BTC.detach().clone()
            optimiser.step()
            with torch.no_grad():  # the optimiser's momentum would move a row without a gradient too
                null_BTC[done_B] = before_BTC[done_B]
    return null_BTC.detach()
