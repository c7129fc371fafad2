from pspnet_jax.errors import grouped


def test_files_with_the_same_fault_share_a_sentence():
    faults = [f"{i}.tif: has uint16 pixels" for i in range(1000)]
    sentences = [*faults, "a.png: is a CMYK image", "the split has no labels", "b.png: is a CMYK image"]
    assert grouped(sentences) == [
        "0.tif: has uint16 pixels (and in 999 more files)",
        "a.png: is a CMYK image (and in 1 more files)",
        "the split has no labels",
    ]
