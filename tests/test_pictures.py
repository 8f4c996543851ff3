"""Picture files of all kinds: what main.py makes of them is what the handbook's own lines make of them."""
import os
import struct
import zlib

import cv2
import numpy as np
import pytest

import main


def photo(height=60, width=80, channels=3, dtype=np.uint8):
    """A smooth picture with noise: something like a photo."""
    rng = np.random.RandomState(height + width)
    base = rng.randint(0, 256, size=(4, 4, channels)).astype(np.float32)
    image = cv2.resize(base, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)
    return (np.clip(image + rng.randn(height, width, channels) * 4, 0, 255) * (np.iinfo(dtype).max // 255)).astype(dtype)


def encoded(image, extension='.png'):
    done, content = cv2.imencode(extension, image)
    assert done
    return content.tobytes()


def saved(path, content):
    with open(str(path), 'wb') as file:
        file.write(content)
    return str(path)


def handbooks_process_image(img_path):
    """What the handbook's listing computes, written out as one sequence."""
    image = cv2.cvtColor(cv2.imread(img_path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    h, w = image.shape[:2]
    scale = min(224 / h, 224 / w)
    oh, ow = round(h * scale), round(w * scale)
    canvas = np.ones((224, 224, 3), dtype=np.uint8) * 114
    canvas[:oh, :ow, :] = cv2.resize(image, (ow, oh), interpolation=cv2.INTER_LINEAR).astype(np.uint8)
    x = np.array(canvas, dtype=np.float32)
    x -= [125.307, 122.961, 113.8575]
    x /= [51.5865, 50.847, 51.255]
    return x.transpose((2, 0, 1))[None]


def assert_handbooks(path):
    tensor = main.process_image(path)
    assert tensor.shape == (1, 3, 224, 224) and tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, handbooks_process_image(path))
    np.testing.assert_array_equal(tensor, main.process_image(main.read_image(path)))


@pytest.mark.stage80
@pytest.mark.parametrize('height, width', [(240, 320), (320, 240), (224, 224), (60, 80), (500, 333), (1, 1), (7, 900)])
def test_process_image_gives_the_handbooks_numbers(tmp_path, height, width):
    for extension in ('.png', '.jpg'):
        assert_handbooks(saved(tmp_path / 'photo', encoded(photo(height, width), extension)))


@pytest.mark.stage80
def test_padding_is_grey_at_the_bottom_or_on_the_right(tmp_path):
    grey = ((114 - np.array([125.307, 122.961, 113.8575])) / [51.5865, 50.847, 51.255]).astype(np.float32)
    wide = main.process_image(saved(tmp_path / 'wide.png', encoded(photo(100, 200))))
    np.testing.assert_allclose(wide[0, :, 112:, :], np.broadcast_to(grey[:, None, None], (3, 112, 224)), rtol=1e-6)
    assert wide[0, :, :112, :].std() > 0.1
    tall = main.process_image(saved(tmp_path / 'tall.png', encoded(photo(200, 100))))
    np.testing.assert_allclose(tall[0, :, :, 112:], np.broadcast_to(grey[:, None, None], (3, 224, 112)), rtol=1e-6)


@pytest.mark.parametrize('height, width', [(1, 3000), (3000, 1)])
def test_a_side_that_rounds_to_nothing_keeps_one_pixel(tmp_path, height, width):
    tensor = main.process_image(saved(tmp_path / 'thin.png', encoded(np.zeros((height, width, 3), np.uint8))))
    assert (tensor < -2).sum() == 3 * 224    # one row or column of black


@pytest.mark.parametrize('image', [photo(channels=1), photo(channels=4), photo(dtype=np.uint16),
                                   photo(channels=1, dtype=np.uint16), photo(channels=4, dtype=np.uint16)])
def test_grey_transparent_and_16_bit_pictures(tmp_path, image):
    assert_handbooks(saved(tmp_path / 'odd.png', encoded(image)))


@pytest.mark.parametrize('name', ['with spaces in it.png', u'\u90c1\u91d1\u9999 \u7684\u7167\u7247.png'])
def test_paths_with_spaces_and_chinese_characters(tmp_path, name):
    image = photo()
    np.testing.assert_array_equal(main.read_image(saved(tmp_path / name, encoded(image))), image[:, :, ::-1])


def with_orientation(jpeg, orientation):
    """The bytes of a JPEG with an EXIF segment that tells how the camera was held."""
    tag = b'II*\x00\x08\x00\x00\x00' + struct.pack('<HHHIHHI', 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b'Exif\x00\x00' + tag
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment + jpeg[2:]


def test_a_photo_taken_with_the_camera_on_its_side(tmp_path):
    jpeg = encoded(photo(60, 80), '.jpg')
    upright = main.read_image(saved(tmp_path / 'upright.jpg', jpeg))
    path = saved(tmp_path / 'photo.jpg', with_orientation(jpeg, 6))
    np.testing.assert_array_equal(main.read_image(path), np.rot90(upright, -1))
    assert_handbooks(path)


def png(*chunks):
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in chunks)


def test_an_animation_whose_first_image_is_none_of_its_frames(tmp_path):
    def rows(value):
        return zlib.compress((b'\x00' + bytes([value]) * 24) * 8)
    content = png((b'IHDR', struct.pack('>IIBBBBB', 8, 8, 8, 2, 0, 0, 0)), (b'acTL', struct.pack('>II', 1, 0)),
                  (b'IDAT', rows(200)), (b'fcTL', struct.pack('>IIIIIHHBB', 0, 8, 8, 0, 0, 1, 10, 0, 0)),
                  (b'fdAT', struct.pack('>I', 1) + rows(50)), (b'IEND', b''))
    assert_handbooks(saved(tmp_path / 'animated.png', content))


@pytest.mark.parametrize('share', [0.3, 0.6, 0.9, 0.999])
def test_a_photo_that_is_cut_short_gives_imreads_pixels(tmp_path, share):
    jpeg = encoded(photo(240, 320), '.jpg')
    assert_handbooks(saved(tmp_path / 'cut.jpg', jpeg[:int(share * len(jpeg))]))


@pytest.mark.skipif(not os.path.isdir('/dev/fd'), reason='names an open pipe as a file')
@pytest.mark.parametrize('share', [0.6, 1])
def test_what_comes_through_a_pipe_is_read_once(tmp_path, share):
    jpeg = encoded(photo(120, 160), '.jpg')    # fits into a pipe
    path = saved(tmp_path / 'photo.jpg', jpeg[:int(share * len(jpeg))])
    reading, writing = os.pipe()
    os.write(writing, jpeg[:int(share * len(jpeg))])
    os.close(writing)
    np.testing.assert_array_equal(main.process_image('/dev/fd/%d' % reading), handbooks_process_image(path))
    os.close(reading)


ENORMOUS = png((b'IHDR', struct.pack('>IIBBBBB', 30000, 30000, 8, 2, 0, 0, 0)),
               (b'IDAT', zlib.compress(bytes(1000000))), (b'IEND', b''))


@pytest.mark.parametrize('content', [
    b'', b'hello', bytes(1000), b'\xff\xd8\xff\xe0', b'GIF89a' + bytes(20), b'\x89PNG\r\n\x1a\n', ENORMOUS])
def test_what_is_no_picture_gets_one_clear_message(tmp_path, content):
    path = saved(tmp_path / 'no picture.jpg', content)
    with pytest.raises(main.InputError, match='no picture') as error:
        main.process_image(path)
    assert path in str(error.value) and '\n' not in str(error.value)


def test_an_absent_file_and_a_folder(tmp_path):
    for path in (str(tmp_path / 'absent.jpg'), str(tmp_path), 'no\0path'):
        with pytest.raises(main.InputError, match='cannot be read'):
            main.read_image(path)


def test_flipped_bytes_and_cut_files_give_imreads_pixels_or_the_clear_error(tmp_path):
    rng, path = np.random.RandomState(12), str(tmp_path / 'photo')
    read = 0
    for extension in ('.jpg', '.png', '.bmp'):
        good = encoded(photo(), extension)
        for trial in range(250):
            content = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                content[rng.randint(min(len(content), 10**rng.randint(2, 6)))] = rng.randint(256)
            if trial % 3 == 0:
                del content[rng.randint(len(content)):]
            saved(path, bytes(content))
            try:
                tensor = main.process_image(path)
            except main.InputError:
                continue
            np.testing.assert_array_equal(tensor, main.process_image(cv2.imread(path)[:, :, ::-1]))
            read += 1
    assert 50 < read < 700
