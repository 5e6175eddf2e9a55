"""Division of images into the square patches that encoders and vision models read."""

from torch import Tensor


def image_patches(image_NYXC: Tensor, patch_size: int) -> Tensor:
    """Divide uint8 images into patches and return their pixels, (N, P, 3 * patch_size^2), float32 from 0 to 1.

    The P patches of an image are in the order of its rows, from the top left.
    """
    images, height, width, _ = image_NYXC.shape
    rows, columns = height // patch_size, width // patch_size
    patch_NRpCpC = image_NYXC.view(images, rows, patch_size, columns, patch_size, 3)
    return patch_NRpCpC.transpose(2, 3).reshape(images, rows * columns, 3 * patch_size**2).float() / 255
