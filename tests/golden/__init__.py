"""Small runs with every feature, recorded to the bit: a change of structure can prove that it changes nothing."""
