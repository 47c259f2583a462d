package vm

import (
	"bytes"
	"encoding/binary"
	"testing"
)

// heap lays RAMBlock records out as QEMU's allocator would.
func heap(base uint64, lines []ramblockLine, hosts []uint64, size int) []byte {
	mem := make([]byte, size)
	at := func(i int) int { return 4096 + i*1024 }
	for i, l := range lines {
		r := mem[at(i):]
		binary.LittleEndian.PutUint64(r[24:], hosts[i])
		binary.LittleEndian.PutUint64(r[40:], l.offset)
		binary.LittleEndian.PutUint64(r[48:], l.used)
		binary.LittleEndian.PutUint64(r[56:], l.total)
		copy(r[76:], l.name)
		if i+1 < len(lines) {
			binary.LittleEndian.PutUint64(r[336:], base+uint64(at(i+1)))
		}
		if i > 0 {
			binary.LittleEndian.PutUint64(r[344:], base+uint64(at(i-1)+336))
		}
	}
	return mem
}

// window is memory that starts at base.
type window struct {
	base uint64
	*bytes.Reader
}

func (w window) ReadAt(p []byte, off int64) (int, error) {
	return w.Reader.ReadAt(p, off-int64(w.base))
}

const heapBase = 0x555500000000

func recordScene() ([]ramblockLine, []uint64, []VMA) {
	lines := []ramblockLine{
		{name: "pc.ram", pageBytes: 4096, used: 1 << 30, total: 1 << 30},
		{name: "0000:00:03.0/virtio-net-pci.rom", pageBytes: 4096, offset: 0x41000000, used: 0x40000, total: 0x40000},
		{name: "0000:00:04.0/virtio-net-pci.rom", pageBytes: 4096, offset: 0x41040000, used: 0x40000, total: 0x40000},
	}
	hosts := []uint64{0x7f0000000000, 0x7f0100000000, 0x7f0200000000}
	vmas := []VMA{{Start: heapBase, End: heapBase + 0x10000, Perms: "rw-p", Path: "[heap]"}}
	for i, h := range hosts {
		vmas = append(vmas, VMA{Start: h, End: h + lines[i].total, Perms: "rw-p"})
	}
	return lines, hosts, vmas
}

func TestRecords(t *testing.T) {
	lines, hosts, vmas := recordScene()
	mem := heap(heapBase, lines, hosts, 0x10000)
	find := func(mem []byte) (map[string]uint64, error) {
		return newRecordFinder(window{heapBase, bytes.NewReader(mem)}, vmas).find(lines, 0)
	}
	check := func(what string, mem []byte, want int) {
		t.Helper()
		got, err := find(mem)
		if err != nil || len(got) != want {
			t.Errorf("%s: %#x, %v", what, got, err)
		}
		for i, l := range lines {
			if h, ok := got[l.name]; ok && h != hosts[i] {
				t.Errorf("%s: %s at %#x, want %#x", what, l.name, h, hosts[i])
			}
		}
	}
	check("intact", mem, 3)

	unlinked := bytes.Clone(mem)
	for i := range lines {
		clear(unlinked[4096+i*1024+336 : 4096+i*1024+352])
	}
	check("without list pointers", unlinked, 3)

	circular := bytes.Clone(mem)
	binary.LittleEndian.PutUint64(circular[4096+2*1024+336:], heapBase+4096)
	check("running in circles", circular, 3)

	elsewhere := bytes.Clone(mem)
	binary.LittleEndian.PutUint64(elsewhere[4096+1024+24:], 0x7f0000001000)
	check("one host address that starts no mapping", elsewhere, 2)

	renamed := bytes.Clone(mem)
	renamed[4096+1024+76] = 'X'
	check("one name changed", renamed, 2)

	check("nothing there", make([]byte, 0x10000), 0)

	// Without its offset a block is found by name and sizes alone, and what is found
	// that way is only where to begin.
	f := func(mem []byte) *recordFinder { return newRecordFinder(window{heapBase, bytes.NewReader(mem)}, vmas) }
	block := RAMBlock{Name: lines[1].name, UsedBytes: lines[1].used, TotalBytes: lines[1].total}
	at := f(mem).seed(&block)
	if want := uint64(heapBase + 4096 + 1024 + 40); at != want {
		t.Errorf("seed at %#x, want %#x", at, want)
	}
	if at := f(renamed).seed(&block); at != 0 {
		t.Errorf("a seed without a record: %#x", at)
	}
	for what, seed := range map[string]uint64{"seed": at, "seed that leads nowhere": heapBase + 8} {
		if got, err := f(mem).find(lines, seed); err != nil || len(got) != 3 || got[lines[2].name] != hosts[2] {
			t.Errorf("%s: %#x, %v", what, got, err)
		}
	}
}

func FuzzRecords(f *testing.F) {
	lines, hosts, vmas := recordScene()
	f.Add(heap(heapBase, lines, hosts, 0x3000))
	f.Fuzz(func(t *testing.T, mem []byte) {
		if len(mem) > 0x10000 {
			return
		}
		found, err := newRecordFinder(window{heapBase, bytes.NewReader(mem)}, vmas).find(lines, 0)
		if err != nil {
			return
		}
		for i := range lines {
			if h, ok := found[lines[i].name]; ok && vmasAt(vmas, h, lines[i].total) == nil {
				t.Fatalf("%s at %#x, where nothing of its size is", lines[i].name, h)
			}
		}
	})
}
