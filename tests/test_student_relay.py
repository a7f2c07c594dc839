"""Attention that goes through a perceiver or resampler: the composed maps, against loops."""

import numpy as np
import torch

from pipeline.student.planes import SIDE, Piece, Planes, latent_maps, project, project_latents


def planes():
    """Three examples: two pieces, none, one. A piece has 3 latents in the text, and 4x5 or 2x3 patches of 24 keys."""
    rng = np.random.default_rng(0)
    first = [
        Piece(rng.permutation(24)[:20].reshape(4, 5), 0.0, 0.0, 0.25, 0.15, np.array([1, 2, 3])),
        Piece(rng.permutation(24)[:6].reshape(2, 3), 0.1, 0.5, 0.5, 0.2, np.array([5, 6, 7])),
    ]
    last = [Piece(rng.permutation(24)[:20].reshape(4, 5), -0.2, 0.0, 0.3, 0.2, np.array([2, 3, 4]))]
    return [first, [], last]


def test_composed_maps_equal_loops():
    examples = planes()
    made = Planes.stack(examples)
    generator = torch.Generator().manual_seed(0)
    relay_NQK = torch.rand(3, 3, 24, generator=generator).softmax(-1)
    probs_BHSK = torch.rand(3, 2, 4, 12, generator=generator).softmax(-1)
    for shift in (torch.zeros(3, dtype=torch.long), torch.tensor([0, 2, 3])):
        made.shift(shift)
        expected = torch.zeros(3, 2, 4, SIDE, SIDE)
        for example, s in np.ndindex(3, 4):
            by = int(shift[example])
            for t, piece in enumerate(examples[example]):
                number = t if example == 0 else 2
                for h in range(2):
                    patches_HW = torch.zeros(piece.columns_HW.shape)
                    for q, column in enumerate(piece.latents_Q):
                        patches_HW += (
                            probs_BHSK[example, h, s, column + by]
                            * relay_NQK[number, q][torch.from_numpy(piece.columns_HW)]
                        )
                    # One piece alone, its patches as keys: the way without a relay, which has tests of its own.
                    rows, cols = piece.columns_HW.shape
                    plain = Piece(
                        np.arange(rows * cols).reshape(rows, cols), piece.top, piece.left, piece.step_y, piece.step_x
                    )
                    alone = project(patches_HW.view(1, 1, 1, -1), Planes.stack([[plain]]))
                    expected[example, h, s] += alone[0, 0, 0]
        found = project_latents(probs_BHSK, latent_maps(relay_NQK, made), made)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert expected.amax() > 2 * expected.mean() > 0


def test_source_names_the_row_of_the_relays_batch():
    examples = planes()
    made = Planes.stack(examples)
    assert made.source.tolist() == [[0, 1], [0, 0], [2, 0]]
    relay_NQK = torch.rand(4, 3, 24, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = latent_maps(relay_NQK[[0, 1, 3]], made)
    made.source[2, 0] = 3
    assert torch.equal(latent_maps(relay_NQK, made), expected)
    assert made.to("cpu").latents is not None
    assert Planes.stack([[], []]).to("cpu").latents is None
