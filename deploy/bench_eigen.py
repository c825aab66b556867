#!/usr/bin/env python3
"""How fast a graph of patches is cut, against a dense generalised solver in the same run.

    python deploy/bench_eigen.py PHOTO... --encoder FILE [--side-px 840] [--threshold 0.3] [--device cpu|cuda]

Each photo is stretched to a square (840 px and patches of 14 px make 3,600 patches), its output tokens become a binary
graph, and its second generalised eigenvector is computed densely as CutLER does (`scipy.linalg.eigh`, the second and
third smallest), by Lanczos iteration, and for all photos together in torch. Prints JSON: CPU seconds a graph on one
BLAS thread (on a GPU wall seconds, after a first unmeasured batch), and how well the vectors agree.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from model.pixels import read_photo
from model.weights.checkpoints import load_encoder
from training.features import compute_features, finish_tokens
from training.labels.masks.discover import normalise_tokens
from training.labels.masks.eigen import solve_cut, solve_cuts, solve_densely
from training.labels.masks.keys import stretch

T = TypeVar("T")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO")
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--side-px", type=int, default=840)
    parser.add_argument("--threshold", type=float, default=0.3)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        graphs = make_graphs(options)
        dense = [measure(partial(solve_densely, each)) for each in graphs]
        alone = [measure(partial(solve_cut, each)) for each in graphs]
        batch = torch.from_numpy(np.stack(graphs)).to(options.device)
        if options.device == "cuda":
            solve_cuts(batch).cpu()
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        together, seconds = measure(lambda: solve_cuts(batch).cpu().numpy(), clock)
    reference = [vector for vector, _ in dense]
    slow, fast = (float(np.mean([spent for _, spent in each])) for each in (dense, alone))
    result = {
        "patches": len(graphs[0]),
        "graphs": len(graphs),
        "near_share": round(float(np.mean(graphs)), 3),
        "dense_seconds": round(slow, 3),
        "lanczos_seconds": round(fast, 4),
        "times_faster": round(slow / fast, 1),
        "batch_seconds": round(seconds / len(graphs), 4),
        "batch_device": options.device,
        "lanczos_worst_difference": worst_difference([vector for vector, _ in alone], reference),
        "batch_worst_difference": worst_difference(list(together), reference),
    }
    print(json.dumps(result))
    return 0


def make_graphs(options: argparse.Namespace) -> list[np.ndarray]:
    encoder = load_encoder(str(options.encoder), options.side_px)
    graphs = []
    for path in options.photos:
        square = stretch(read_photo(path).image, options.side_px).transpose(2, 0, 1)
        maps = next(iter(compute_features(encoder, torch.from_numpy(square.copy()[None]))))
        tokens = normalise_tokens(finish_tokens(encoder, maps), is_centred=False)
        flat = tokens.reshape(-1, tokens.shape[-1])
        graphs.append(flat @ flat.T > options.threshold)
    return graphs


def measure(work: Callable[[], T], clock: Callable[[], float] = time.process_time) -> tuple[T, float]:
    started = clock()
    result = work()
    return result, clock() - started


def worst_difference(vectors: list[np.ndarray], reference: list[np.ndarray]) -> float:
    """1 - |cos|, of the pair that agrees least."""
    return float(max(1.0 - abs(one @ other) for one, other in zip(vectors, reference, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
