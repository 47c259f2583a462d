package export

// writeRaw writes guest RAM at its guest-physical addresses, from 0 to the highest;
// what is not RAM reads as zeros. Where things are, Summary.Map says.
func writeRaw(x *exporter) error {
	mem, err := x.physical(true)
	if err != nil {
		return err
	}
	for _, r := range mem {
		x.total += r.bytes
	}
	for _, r := range mem {
		if err := x.w.zeros(r.gpa - x.w.bytes); err != nil {
			return err
		}
		x.sum.Map = append(x.sum.Map, Range{GPA: r.gpa, Bytes: r.bytes, Offset: r.gpa, Block: x.m.Blocks[r.block].Name})
		if err := x.memory(r); err != nil {
			return err
		}
	}
	return nil
}

// memory writes one range.
func (x *exporter) memory(r physRange) error {
	return x.each(r.block, r.offset, r.bytes, func(_ uint64, data []byte, n uint64) error {
		if data == nil {
			return x.w.zeros(n)
		}
		_, err := x.w.Write(data)
		return err
	})
}
