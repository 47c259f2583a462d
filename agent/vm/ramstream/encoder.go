package ramstream

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// encoderBytes is what is gathered for one write.
const encoderBytes = 1 << 20

// Encoder writes one stream. It is not safe for concurrent use.
type Encoder struct {
	w       *bufio.Writer
	id      uint32
	footers bool
	blocks  []Block
	current int // block whose part section is open; -1: none
	part    bool
}

// NewEncoder makes an Encoder whose RAM sections have this id, which must differ
// from those of all device sections. Machine types up to 2.3 have no footers.
func NewEncoder(w io.Writer, id uint32, footers bool) *Encoder {
	return &Encoder{w: bufio.NewWriterSize(w, encoderBytes), id: id, footers: footers, current: -1}
}

// Begin writes the head (header and configuration, from vmstate) and the list of
// blocks.
func (e *Encoder) Begin(head []byte, blocks []Block) error {
	e.blocks = blocks
	if _, err := e.w.Write(head); err != nil {
		return err
	}
	b := []byte{typeStart}
	b = binary.BigEndian.AppendUint32(b, e.id)
	b = appendName(b, sectionName)
	b = binary.BigEndian.AppendUint32(b, 0) // instance
	b = binary.BigEndian.AppendUint32(b, sectionVersion)
	var total uint64
	for _, blk := range blocks {
		if blk.Name == "" || len(blk.Name) > maxNameBytes || blk.UsedBytes%PageBytes != 0 {
			return fmt.Errorf("RAMBlock %.60q of %d bytes cannot stand in a migration stream", blk.Name, blk.UsedBytes)
		}
		total += blk.UsedBytes
	}
	b = binary.BigEndian.AppendUint64(b, total|flagMemSize)
	for _, blk := range blocks {
		if blk.UsedBytes == 0 {
			continue // a reader stops at the total
		}
		b = appendName(b, blk.Name)
		b = binary.BigEndian.AppendUint64(b, blk.UsedBytes)
	}
	if _, err := e.w.Write(b); err != nil {
		return err
	}
	return e.closeSection()
}

func appendName(b []byte, name string) []byte {
	return append(append(b, byte(len(name))), name...)
}

// closeSection writes the end of a RAM section.
func (e *Encoder) closeSection() error {
	b := binary.BigEndian.AppendUint64(nil, flagEOS)
	if e.footers {
		b = append(b, typeFooter)
		b = binary.BigEndian.AppendUint32(b, e.id)
	}
	_, err := e.w.Write(b)
	return err
}

func (e *Encoder) openSection(kind byte) error {
	_, err := e.w.Write(binary.BigEndian.AppendUint32([]byte{kind}, e.id))
	return err
}

// record writes the address of a page, with its block's name where that differs
// from the page before. Every block gets a section of its own, as a stream's reader
// reports its progress by them.
func (e *Encoder) record(block int, offset uint64, flags uint64) error {
	if block < 0 || block >= len(e.blocks) || offset%PageBytes != 0 || offset >= e.blocks[block].UsedBytes {
		return fmt.Errorf("page at %#x of RAMBlock %d of %d is outside", offset, block, len(e.blocks))
	}
	if block != e.current {
		if e.part {
			if err := e.closeSection(); err != nil {
				return err
			}
		}
		if err := e.openSection(typePart); err != nil {
			return err
		}
		e.current, e.part = block, true
		if err := e.address(offset | flags); err != nil {
			return err
		}
		name := e.blocks[block].Name
		if err := e.w.WriteByte(byte(len(name))); err != nil {
			return err
		}
		_, err := e.w.WriteString(name)
		return err
	}
	return e.address(offset | flags | flagContinue)
}

func (e *Encoder) address(v uint64) error {
	_, err := e.w.Write(binary.BigEndian.AppendUint64(e.w.AvailableBuffer(), v))
	return err
}

// Page writes the content of one page.
func (e *Encoder) Page(block int, offset uint64, data []byte) error {
	if len(data) != PageBytes {
		return fmt.Errorf("page of %d bytes, want %d", len(data), PageBytes)
	}
	if err := e.record(block, offset, flagPage); err != nil {
		return err
	}
	_, err := e.w.Write(data)
	return err
}

// Zero says that a page holds zeros.
func (e *Encoder) Zero(block int, offset uint64) error {
	if err := e.record(block, offset, flagZero); err != nil {
		return err
	}
	return e.w.WriteByte(0)
}

// End closes RAM, writes the tail (device sections, end mark and description, from
// vmstate) and everything that was gathered.
func (e *Encoder) End(tail []byte) error {
	if e.part {
		if err := e.closeSection(); err != nil {
			return err
		}
	}
	if err := e.openSection(typeEnd); err != nil {
		return err
	}
	if err := e.closeSection(); err != nil {
		return err
	}
	if _, err := e.w.Write(tail); err != nil {
		return err
	}
	return e.w.Flush()
}
