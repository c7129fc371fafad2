"""The published evaluations transcribed to NumPy, with loops and float64; shares no code with the package."""

import itertools
import math

import numpy as np

CLASSES = 3
# Weights of the channels of a pixel, of its left neighbor and of the pixel below it.
MIX = np.random.default_rng(0).normal(size=(3, 3, CLASSES))


def network(x, numpy=np):
    """Returns logits [..., h, w, K] of [..., h, w, 3] that depend on pixels, position in the window, and orientation."""
    left = numpy.concatenate([numpy.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)
    below = numpy.concatenate([x[..., 1:, :, :], numpy.zeros_like(x[..., :1, :, :])], -3)
    place = np.linspace(-1, 1, x.shape[-3])[:, None] + np.linspace(0, 3, x.shape[-2])
    return x @ MIX[0] + left @ MIX[1] + below @ MIX[2] + place[..., None] * np.arange(CLASSES)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalized(image, config):
    return (image - np.array(config.normalize.mean)) / np.array(config.normalize.std)


def starts(size, crop, stride):
    """Returns the first pixel of each window; the last window ends with the image."""
    grid = math.ceil((size - crop) / stride) + 1
    return [min(i * stride + crop, size) - crop for i in range(grid)]


def slide(scores_of, image, crop, strides):
    """Averages scores_of(window), [h, w, K], over all windows; the image is at least as large as one window."""
    total, times = np.zeros((*image.shape[:2], CLASSES)), np.zeros((*image.shape[:2], 1))
    vertical, horizontal = (starts(*axis) for axis in zip(image.shape[:2], crop, strides, strict=True))
    for y, x in itertools.product(vertical, horizontal):
        window = np.s_[y : y + crop[0], x : x + crop[1]]
        total[window] += scores_of(image[window])
        times[window] += 1
    return total / times


# cv2.resize and torch's interpolate, one pixel at a time


def interpolate(image, height, width, align_corners=False):
    out = np.zeros((height, width, image.shape[2]))
    for i, j in itertools.product(range(height), range(width)):
        if align_corners:
            y, x = (k * (s - 1) / (n - 1) for k, s, n in zip((i, j), image.shape, out.shape[:2], strict=False))
        else:
            y, x = ((k + 0.5) * s / n - 0.5 for k, s, n in zip((i, j), image.shape, out.shape[:2], strict=False))
        y, x = (min(max(k, 0), s - 1) for k, s in zip((y, x), image.shape, strict=False))
        top, left = int(y), int(x)
        bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        upper = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
        lower = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
        out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def cv2_8bit(image, height, width):
    """cv2's INTER_LINEAR for uint8: integer weights in units of 1/2048, from float32 positions.

    Columns come first and add 11 bits; rows add 11 more. Of these, 4, 16 and 2 bits are dropped in turn.
    """
    out = np.zeros((height, width, image.shape[2]))
    for i, j in itertools.product(range(height), range(width)):
        y, x = (np.float32((k + 0.5) * (s / n) - 0.5) for k, s, n in zip((i, j), image.shape, out.shape[:2], strict=False))
        top, left = math.floor(y), math.floor(x)
        lines = []
        for row in (top, top + 1):
            line = image[min(max(row, 0), image.shape[0] - 1)].astype(int)
            first, second = (line[min(max(column, 0), image.shape[1] - 1)] for column in (left, left + 1))
            right = x - np.float32(left)
            lines.append(first * round(float((1 - right) * 2048)) + second * round(float(right * 2048)))
        below = y - np.float32(top)
        upper, lower = round(float((1 - below) * 2048)), round(float(below * 2048))
        out[i, j] = ((upper * (lines[0] // 16)) // 65536 + (lower * (lines[1] // 16)) // 65536 + 2) // 4
    return out


def imresize(image, height, width):
    """MATLAB's imresize(image, [height width], 'bilinear'): pixels are numbered from 1, and uint8 stays uint8."""
    gray = image.dtype == np.uint8
    scales = height / image.shape[0], width / image.shape[1]
    for axis in sorted((0, 1), key=lambda axis: scales[axis]):
        scale, source = scales[axis], image.shape[axis]
        matrix = np.zeros(((height, width)[axis], source))
        for k in range(len(matrix)):
            center = (k + 1) / scale + 0.5 * (1 - 1 / scale)
            for pixel in range(math.floor(center - 1 / scale) - 2, math.ceil(center + 1 / scale) + 3):
                distance = (center - pixel) * min(scale, 1)
                reflected = (pixel - 1) % (2 * source)
                matrix[k, reflected if reflected < source else 2 * source - 1 - reflected] += max(0, 1 - abs(distance))
        image = np.moveaxis(np.tensordot(matrix / matrix.sum(1, keepdims=True), image.astype(float), (1, axis)), 0, axis)
        image = np.floor(image + 0.5 + 1e-9) if gray else image
    return image


# The evaluations; net takes one normalized window [h, w, 3]


def semseg(net, image, config):
    height, width = image.shape[:2]
    mean = np.array(config.normalize.mean)
    result = np.zeros((height, width, CLASSES))
    for scale in config.eval.scales:
        long = round(scale * (config.eval.base_size or max(height, width)))
        if height > width:
            new_h, new_w = long, round(long / float(height) * width)
        else:
            new_h, new_w = round(long / float(width) * height), long
        crop = (new_h, new_w) if config.eval.inference == "whole" else config.eval.crop
        missing = [max(c - n, 0) for c, n in zip(crop, (new_h, new_w), strict=True)]
        top, left = int(missing[0] / 2), int(missing[1] / 2)
        padded = np.tile(mean, (new_h + missing[0], new_w + missing[1], 1))
        padded[top : top + new_h, left : left + new_w] = interpolate(image.astype(float), new_h, new_w)

        def scores_of(window):
            window = normalized(window, config)
            if not config.eval.flip:
                return softmax(net(window))
            return (softmax(net(window)) + softmax(net(window[:, ::-1]))[:, ::-1]) / 2

        strides = [s or int(np.ceil(c * (2 / 3))) for s, c in zip(config.eval.stride, crop, strict=True)]
        found = slide(scores_of, padded, crop, strides)
        result += interpolate(found[top : top + new_h, left : left + new_w], height, width)
    return result / len(config.eval.scales)


def caffe(net, image, config):
    height, width = image.shape[:2]
    mean = np.array(config.normalize.mean)
    result = np.zeros((height, width, CLASSES))
    for scale in config.eval.scales:
        rows = columns = (config.eval.base_size or max(height, width)) * scale + 1
        if height > width:
            columns = math.floor(float(np.float32(rows) / np.float32(height) * np.float32(width)) + 0.5)
        else:
            rows = math.floor(float(np.float32(columns) / np.float32(width) * np.float32(height)) + 0.5)
        rows, columns = math.ceil(rows), math.ceil(columns)
        crop = (rows, columns) if config.eval.inference == "whole" else config.eval.crop
        padding = mean if rows <= crop[0] and columns <= crop[1] else np.array([math.floor(m + 0.5) for m in mean])
        padded = np.tile(padding, (max(rows, crop[0]), max(columns, crop[1]), 1))
        padded[:rows, :columns] = imresize(image, rows, columns)

        def scores_of(window):
            window = normalized(window, config)
            return softmax(net(window) + (net(window[:, ::-1])[:, ::-1] if config.eval.flip else 0))

        strides = [s or math.ceil(c * (2 / 3)) for s, c in zip(config.eval.stride, crop, strict=True)]
        found = imresize(slide(scores_of, padded, crop, strides)[:rows, :columns], height, width)
        result += found / found.sum(2, keepdims=True)
    return result / len(config.eval.scales)


def mmseg(net, image, config):
    """Its "slide" and "whole" modes, with test-time augmentation."""
    (height, width), settings = image.shape[:2], config.eval
    views = []
    for scale in settings.scales:
        long, short = max(height, width), min(height, width)
        bounds = [int(long * scale + 0.5), int(short * scale + 0.5)]
        if settings.base_size:
            bounds = [int(settings.base_size * scale), math.inf]
        if settings.short_size:
            bounds[1] = int(settings.short_size * scale)
        factor = min(bounds[0] / long, bounds[1] / short)
        scaled = cv2_8bit(image, int(height * factor + 0.5), int(width * factor + 0.5))
        for flip in (False, True) if settings.flip else (False,):
            view = normalized(scaled[:, ::-1] if flip else scaled, config)
            crop = [min(c, n) for c, n in zip(settings.crop, view.shape, strict=False)]
            strides = [s or math.ceil(c * 2 / 3) for s, c in zip(settings.stride, settings.crop, strict=True)]
            logits = net(view) if settings.inference == "whole" else slide(net, view, crop, strides)
            logits = logits[:, ::-1] if flip else logits
            views.append(softmax(interpolate(logits, height, width, config.model.align_corners)))
    return np.mean(views, 0)
