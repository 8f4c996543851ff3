"""Picture files of all kinds, and the handbook's own lines for reading one."""
import os
import struct
import sys
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


def written(path, image, extension='.png', *options):
    """Encode in memory and write the bytes: the path may be one that cv2.imwrite does not take."""
    done, content = cv2.imencode(extension, image, *options)
    assert done
    with open(str(path), 'wb') as file:
        file.write(content.tobytes())
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


@pytest.mark.stage80
@pytest.mark.parametrize('height, width', [(240, 320), (320, 240), (224, 224), (60, 80), (500, 333), (1, 1), (7, 900)])
def test_process_image_gives_the_handbooks_numbers(tmp_path, height, width):
    for extension in ('.png', '.jpg'):
        path = written(tmp_path / ('photo' + extension), photo(height, width), extension)
        tensor = main.process_image(path)
        assert tensor.shape == (1, 3, 224, 224) and tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, handbooks_process_image(path))


@pytest.mark.stage80
def test_padding_is_grey_at_the_bottom_or_on_the_right(tmp_path):
    grey = ((114 - np.array([125.307, 122.961, 113.8575])) / [51.5865, 50.847, 51.255]).astype(np.float32)
    wide = main.process_image(written(tmp_path / 'wide.png', photo(100, 200)))
    np.testing.assert_allclose(wide[0, :, 112:, :], np.broadcast_to(grey[:, None, None], (3, 112, 224)), rtol=1e-6)
    assert wide[0, :, :112, :].std() > 0.1
    tall = main.process_image(written(tmp_path / 'tall.png', photo(200, 100)))
    np.testing.assert_allclose(tall[0, :, :, 112:], np.broadcast_to(grey[:, None, None], (3, 224, 112)), rtol=1e-6)


@pytest.mark.parametrize('height, width', [(1, 3000), (3000, 1)])
def test_a_side_that_rounds_to_nothing_keeps_one_pixel(tmp_path, height, width):
    tensor = main.process_image(written(tmp_path / 'thin.png', np.zeros((height, width, 3), np.uint8)))
    assert (tensor < -2).sum() == 3 * 224    # one row or column of black


@pytest.mark.parametrize('image', [photo(channels=1), photo(channels=4), photo(dtype=np.uint16),
                                   photo(channels=1, dtype=np.uint16), photo(channels=4, dtype=np.uint16)])
def test_grey_transparent_and_16_bit_pictures_are_read_as_opencv_reads_them(tmp_path, image):
    path = written(tmp_path / 'odd.png', image)
    np.testing.assert_array_equal(main.process_image(path), handbooks_process_image(path))


@pytest.mark.parametrize('name', ['with spaces in it.png', u'\u90c1\u91d1\u9999 \u7684\u7167\u7247.png'])
def test_paths_with_spaces_and_chinese_characters(tmp_path, name):
    image = photo()
    np.testing.assert_array_equal(main.read_image(written(tmp_path / name, image)), image[:, :, ::-1])


def with_orientation(jpeg, orientation):
    """The bytes of a JPEG with an EXIF segment that tells how the camera was held."""
    tag = b'II*\x00\x08\x00\x00\x00' + struct.pack('<HHHIHHI', 1, 0x0112, 3, 1, orientation, 0, 0)
    segment = b'Exif\x00\x00' + tag
    return jpeg[:2] + b'\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment + jpeg[2:]


def test_a_photo_taken_with_the_camera_on_its_side(tmp_path):
    path = written(tmp_path / 'photo.jpg', photo(60, 80), '.jpg')
    upright = main.read_image(path)
    with open(path, 'rb') as file:
        content = with_orientation(file.read(), 6)
    with open(path, 'wb') as file:
        file.write(content)
    np.testing.assert_array_equal(main.read_image(path), np.rot90(upright, -1))
    np.testing.assert_array_equal(main.process_image(path), handbooks_process_image(path))


def enormous_png(side):
    """A few kilobytes that say they are a picture of side x side pixels."""
    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) +
            chunk(b'IDAT', zlib.compress(bytes(1000000))) + chunk(b'IEND', b''))


@pytest.mark.parametrize('content', [
    b'', b'hello', bytes(1000), b'\xff\xd8\xff\xe0', b'GIF89a' + bytes(20), b'\x89PNG\r\n\x1a\n', enormous_png(30000)])
def test_what_is_no_picture_gets_one_clear_message(tmp_path, content):
    path = str(tmp_path / 'no picture.jpg')
    with open(path, 'wb') as file:
        file.write(content)
    with pytest.raises(main.PictureError, match='no picture') as error:
        main.process_image(path)
    assert path in str(error.value) and '\n' not in str(error.value)


def test_an_absent_file_and_a_folder(tmp_path):
    with pytest.raises(main.PictureError, match='cannot be read'):
        main.read_image(str(tmp_path / 'absent.jpg'))
    with pytest.raises(main.PictureError, match='cannot be read'):
        main.read_image(str(tmp_path))


def usable(path):
    """Whether a file is read; what is not has to give the clear error."""
    try:
        tensor = main.process_image(path)
    except main.PictureError:
        return False
    assert tensor.shape == (1, 3, 224, 224) and np.isfinite(tensor).all()
    return True


def test_flipped_bytes_and_cut_files_give_a_picture_or_the_clear_error(tmp_path):
    rng = np.random.RandomState(12)
    outcomes = []
    for extension in ('.jpg', '.png', '.bmp'):
        good = cv2.imencode(extension, photo())[1].tobytes()
        for trial in range(250):
            content = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                content[rng.randint(min(len(content), 10**rng.randint(2, 6)))] = rng.randint(256)
            if trial % 3 == 0:
                del content[rng.randint(len(content)):]
            path = str(tmp_path / 'photo')
            with open(path, 'wb') as file:
                file.write(content)
            outcomes.append(usable(path))
    assert 50 < sum(outcomes) < 700


@pytest.mark.parametrize('arguments, words', [
    (['absent.jpg'], 'absent.jpg: cannot be read'),
    (['--label', 'dandelion'], "argument --label: 'dandelion' is no class: give a number from 0 to 3 or one of daisy"),
    (['--label', '4'], 'argument --label'),
    (['--label', '-1'], 'argument --label'),
    (['--ckpt', 'absent.npy'], 'absent.npy: no such file'),
    (['one.jpg', 'two.jpg'], 'unrecognized arguments: two.jpg'),
])
def test_wrong_arguments_are_named_before_anything_is_printed(arguments, words, capsys):
    try:
        status = main.main(arguments)
    except SystemExit as error:
        status = error.code
    printed = capsys.readouterr()
    assert status != 0 and printed.out == ''
    assert words in printed.err and 'Traceback' not in printed.err


def test_labels_by_name_and_number():
    assert [main.class_number(text) for text in main.CLASSES] == [0, 1, 2, 3]
    assert [main.class_number(text) for text in '0123'] == [0, 1, 2, 3]
    assert main.arguments_of([]).label == 1


def test_paths_are_found_from_the_scripts_own_folder():
    assert os.path.dirname(os.path.dirname(main.IMAGE)) == os.path.dirname(os.path.abspath(sys.modules['main'].__file__))
