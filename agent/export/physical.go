package export

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/ckagent/ckagent/agent/image"
)

// physRange is a piece of guest-physical memory and where it is in the checkpoint.
type physRange struct {
	gpa, bytes uint64
	block      int
	offset     uint64
}

func (p physRange) end() uint64 { return p.gpa + p.bytes }

// physical lists guest-physical memory in order of address, neighbours joined. With
// mainOnly it is guest RAM alone, without video memory and ROMs.
func (x *exporter) physical(mainOnly bool) ([]physRange, error) {
	var out []physRange
	known := false
	for i, b := range x.m.Blocks {
		known = known || len(b.Ranges) > 0
		if mainOnly && !b.Main {
			continue
		}
		for _, g := range b.Ranges {
			if g.Offset >= b.UsedBytes {
				continue
			}
			out = append(out, physRange{g.GPA, min(g.Bytes, b.UsedBytes-g.Offset), i, g.Offset})
		}
	}
	if !known {
		var err error
		if out, err = conventional(x.m); err != nil {
			return nil, x.refuse("%w", err)
		}
	}
	out, err := arrange(out)
	if err != nil {
		return nil, x.refuse("%w", err)
	}
	return out, nil
}

// arrange sorts and joins ranges, which must be whole pages and not overlap.
func arrange(list []physRange) ([]physRange, error) {
	slices.SortFunc(list, func(a, b physRange) int { return cmp.Compare(a.gpa, b.gpa) })
	var out []physRange
	for _, r := range list {
		if r.gpa%pageBytes != 0 || r.bytes%pageBytes != 0 || r.offset%pageBytes != 0 {
			return nil, fmt.Errorf("memory at %#x (%#x bytes) is not whole pages", r.gpa, r.bytes)
		}
		if len(out) > 0 {
			last := &out[len(out)-1]
			if r.gpa < last.end() {
				return nil, fmt.Errorf("two memories are recorded at guest-physical address %#x", r.gpa)
			}
			if r.gpa == last.end() && r.block == last.block && r.offset == last.offset+last.bytes {
				last.bytes += r.bytes
				continue
			}
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("none of its memory has a known guest-physical address")
	}
	return out, nil
}

const pageBytes = 4096

// conventional places guest RAM for checkpoints that do not record where it was
// (format 1.0, imported streams): PC machines have a fixed rule for one block of
// RAM, which leaves a gap for devices below 4 GiB.
func conventional(m *image.Manifest) ([]physRange, error) {
	const fourGiB = 4 << 30
	ram := -1
	for i, b := range m.Blocks {
		if b.Main {
			if ram >= 0 {
				return nil, fmt.Errorf("where its RAM is in guest-physical memory is not recorded, and it has more than one block of it")
			}
			ram = i
		}
	}
	for _, a := range m.Machine.Argv {
		if strings.Contains(a, "max-ram-below-4g") {
			return nil, fmt.Errorf("where its RAM is in guest-physical memory is not recorded, and max-ram-below-4g moves it")
		}
	}
	var below uint64
	switch t := m.Machine.Type; {
	case ram < 0:
		return nil, fmt.Errorf("it has no block of RAM")
	case strings.HasPrefix(t, "pc-i440fx-"):
		if below = 0xe0000000; m.Blocks[ram].UsedBytes >= below {
			below = 0xc0000000
		}
	case strings.HasPrefix(t, "pc-q35-"):
		if below = 0xb0000000; m.Blocks[ram].UsedBytes >= below {
			below = 0x80000000
		}
	default:
		return nil, fmt.Errorf("where its RAM is in guest-physical memory is not recorded, and machine type %s has no known rule", t)
	}
	n := m.Blocks[ram].UsedBytes
	out := []physRange{{0, min(n, below), ram, 0}}
	if n > below {
		out = append(out, physRange{fourGiB, n - below, ram, below})
	}
	return out, nil
}
