"""Clips of a texture that moves by a known number of pixels."""

import cv2
import numpy as np

FPS, FRAMES, HEIGHT, WIDTH = 24.0, 16, 96, 160


def texture(seed: int = 0) -> np.ndarray:
    """A large grey picture with structure of several pixels."""
    noise = np.random.default_rng(seed).uniform(0, 1, (400, 400)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return cv2.normalize(smooth, None, 60, 255, cv2.NORM_MINMAX).astype(np.uint8)


def moving(down: int, right: int, *, seed: int = 0) -> np.ndarray:
    """A clip of a texture, moved by some pixels a frame."""
    large = texture(seed)
    frames = [
        large[down * n : down * n + HEIGHT, right * n : right * n + WIDTH] for n in range(FRAMES)
    ]
    return np.repeat(np.stack(frames)[..., None], 3, -1)
