"""Patches of images."""

from torch import Tensor


def image_patches(image_NYXC: Tensor, patch_size: int) -> Tensor:
    """Return the patches of images (N, P, 3 * patch_size^2), float32, from 0 to 1, row by row of the image.

    Args:
        image_NYXC: uint8 images.
        patch_size: height and width of a patch in pixels.
    """
    images, height, width, _ = image_NYXC.shape
    rows, columns = height // patch_size, width // patch_size
    patch_NRpCpC = image_NYXC.view(images, rows, patch_size, columns, patch_size, 3)
    return patch_NRpCpC.transpose(2, 3).reshape(images, rows * columns, 3 * patch_size**2).float() / 255
