from pspnet_jax.errors import grouped


def test_files_with_the_same_fault_share_a_sentence():
    faults = [f"{i}.tif: has uint16 pixels" for i in range(1000)]
    sentences = [*faults, "a.png: is a CMYK image", "the split has no labels", "b.png: is a CMYK image"]
    sentences += [f"{i}.png: is {i}x{i}, but its image d/{i}.jpg is 8x{i}" for i in range(10)]
    sentences += [f"{i}.png: label value {7 + i // 5} at {1000 * i:,} pixels is not in the map" for i in range(10)]
    assert grouped(sentences) == [
        "0.tif: has uint16 pixels (and in 999 more files)",
        "a.png: is a CMYK image (and in 1 more files)",
        "the split has no labels",
        "0.png: is 0x0, but its image d/0.jpg is 8x0 (and in 9 more files)",
        "0.png: label value 7 at 0 pixels is not in the map (and in 4 more files)",
        "5.png: label value 8 at 5,000 pixels is not in the map (and in 4 more files)",
    ]
