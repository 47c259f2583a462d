package export

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

// tables writes page tables into RAM.
type tables []byte

func (r tables) entry64(table uint64, index int, v uint64) {
	binary.LittleEndian.PutUint64(r[table+8*uint64(index):], v)
}

func (r tables) entry32(table uint64, index int, v uint32) {
	binary.LittleEndian.PutUint32(r[table+4*uint64(index):], v)
}

// walk follows the page tables in RAM that lies at 0.
func walk(t *testing.T, ram []byte, cpus ...vmstate.CPU) ([]mapping, error) {
	t.Helper()
	img := checkpoint(t, ram, func(m *image.Manifest) {
		m.Blocks[0].Ranges = []image.GPARange{{GPA: 0, Offset: 0, Bytes: uint64(len(ram))}}
		m.Blocks[1].Ranges = nil
	})
	x := &exporter{ctx: t.Context(), r: img.Reader, m: img.Manifest(), w: &counter{w: &bytes.Buffer{}}, sum: &Summary{}}
	mem, err := x.physical(false)
	if err != nil {
		t.Fatal(err)
	}
	return x.mappings(mem, cpus)
}

func long(cr3 uint64) vmstate.CPU {
	return vmstate.CPU{CR: [5]uint64{0: cr0Paging | 1, 3: cr3, 4: cr4PAE}, EFER: eferLMA}
}

const pg = uint64(pageBytes)

func TestLongMode(t *testing.T) {
	ram := tables(make([]byte, 16<<20))
	const p, big = ptePresent, pteLarge
	ram.entry64(1*pg, 0, 2*pg|p)   // PML4: low half
	ram.entry64(1*pg, 511, 3*pg|p) // the top
	ram.entry64(1*pg, 256, 1*pg|p) // itself, as some kernels do
	ram.entry64(2*pg, 0, 4*pg|p)
	ram.entry64(2*pg, 1, 0|p|big) // 1 GiB at 0, of which 16 MiB are RAM
	ram.entry64(3*pg, 511, 5*pg|p)
	ram.entry64(4*pg, 0, 6*pg|p)
	ram.entry64(5*pg, 511, (2<<20)|p|big) // the last 2 MiB of the address space
	ram.entry64(6*pg, 1, 8*pg|p|1<<63)    // two pages in a row, no-execute
	ram.entry64(6*pg, 2, 9*pg|p)
	ram.entry64(6*pg, 4, 7*pg|p)
	ram.entry64(6*pg, 5, 1<<40|p) // no memory there
	got, err := walk(t, ram, long(1*pg))
	if err != nil {
		t.Fatal(err)
	}
	var want, have []mapping
	for _, m := range got {
		// What the table shows of itself is checked by its number alone.
		if m.virt < 1<<40 || m.virt >= ^uint64(0)-2<<20 {
			have = append(have, m)
		}
	}
	want = []mapping{
		{virt: 1 * pg, phys: 8 * pg, bytes: 2 * pg}, {virt: 4 * pg, phys: 7 * pg, bytes: pg},
		{virt: 1 << 30, phys: 0, bytes: 16 << 20}, {virt: ^uint64(0) - 2<<20 + 1, phys: 2 << 20, bytes: 2 << 20},
	}
	if diff := cmp.Diff(want, have, cmp.AllowUnexported(mapping{})); diff != "" {
		t.Error(diff)
	}
	if len(got) == len(have) {
		t.Error("nothing was found through the table's entry for itself")
	}
}

func TestFiveLevels(t *testing.T) {
	ram := tables(make([]byte, 2<<20))
	for level := uint64(1); level <= 4; level++ {
		ram.entry64(level*pg, 256, (level+1)*pg|ptePresent)
	}
	ram.entry64(5*pg, 7, 9*pg|ptePresent)
	c := long(1 * pg)
	c.CR[4] |= cr4LA57
	got, err := walk(t, ram, c)
	const virt = uint64(0xfe00000000000000 | 256<<48 | 256<<39 | 256<<30 | 256<<21 | 7<<12)
	if want := []mapping{{virt: virt, phys: 9 * pg, bytes: pg}}; err != nil || cmp.Diff(want, got, cmp.AllowUnexported(mapping{})) != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestThirtyTwoBits(t *testing.T) {
	ram := tables(make([]byte, 8<<20))
	// PAE: a table of four entries, 32 bytes behind the start of a page.
	ram.entry64(1*pg+32, 3, 2*pg|ptePresent)
	ram.entry64(2*pg, 0, 3*pg|ptePresent)
	ram.entry64(2*pg, 1, (2<<20)|ptePresent|pteLarge)
	ram.entry64(3*pg, 0, 9*pg|ptePresent)
	pae := vmstate.CPU{CR: [5]uint64{0: cr0Paging, 3: 1*pg + 32, 4: cr4PAE}}
	want := []mapping{{virt: 3 << 30, phys: 9 * pg, bytes: pg}, {virt: 3<<30 | 2<<20, phys: 2 << 20, bytes: 2 << 20}}
	if got, err := walk(t, ram, pae); err != nil || cmp.Diff(want, got, cmp.AllowUnexported(mapping{})) != "" {
		t.Errorf("PAE: %+v, %v", got, err)
	}
	// Two levels, with a page of 4 MiB.
	ram.entry32(4*pg, 1, uint32(5*pg|ptePresent))
	ram.entry32(4*pg, 3, 4<<20|ptePresent|pteLarge)
	ram.entry32(5*pg, 2, uint32(9*pg|ptePresent))
	legacy := vmstate.CPU{CR: [5]uint64{0: cr0Paging, 3: 4 * pg, 4: cr4PSE}}
	want = []mapping{{virt: 4<<20 | 2*pg, phys: 9 * pg, bytes: pg}, {virt: 12 << 20, phys: 4 << 20, bytes: 4 << 20}}
	if got, err := walk(t, ram, legacy); err != nil || cmp.Diff(want, got, cmp.AllowUnexported(mapping{})) != "" {
		t.Errorf("32 bits: %+v, %v", got, err)
	}
}

// TestTwoCPUs sees different memory at one address.
func TestTwoCPUs(t *testing.T) {
	ram := tables(make([]byte, 4<<20))
	// The first vCPU: pages 0x10000 and 0x11000. The second: 0x11000 to 0x12fff.
	for cpu, base := range []uint64{1, 5} {
		for level := range uint64(3) {
			ram.entry64((base+level)*pg, 0, (base+level+1)*pg|ptePresent)
		}
		for i := range uint64(2) {
			ram.entry64((base+3)*pg, 16+cpu+int(i), (uint64(20+10*cpu)+i)*pg|ptePresent)
		}
	}
	got, err := walk(t, ram, long(1*pg), long(5*pg), long(1*pg))
	want := []mapping{{virt: 16 * pg, phys: 20 * pg, bytes: 2 * pg}, {virt: 18 * pg, phys: 31 * pg, bytes: pg}}
	if err != nil || cmp.Diff(want, got, cmp.AllowUnexported(mapping{})) != "" {
		t.Errorf("%+v, %v", got, err)
	}
}

// TestHostileTables has every table refer to itself everywhere.
func TestHostileTables(t *testing.T) {
	ram := tables(make([]byte, 2<<20))
	for i := range 512 {
		ram.entry64(1*pg, i, 1*pg|ptePresent)
	}
	if _, err := walk(t, ram, long(1*pg)); !problem.Is(err, problem.Refused) {
		t.Errorf("%v, want refused", err)
	}
	// None at all: memory is not there.
	if _, err := walk(t, ram, long(1<<40)); !problem.Is(err, problem.Refused) {
		t.Errorf("%v, want refused", err)
	}
}

// TestVirtualCore reads memory at a virtual address out of a core.
func TestVirtualCore(t *testing.T) {
	loads := []load{{virt: 0xffffffff80000000, phys: 0x1000, bytes: 0x1000, offset: 0x2000}}
	b := append(elfHead(loads, 176, 0), make([]byte, 0x4000)...)
	copy(b[0x2000:], "Linux")
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	p := f.Progs[1]
	got := make([]byte, 5)
	if _, err := p.ReadAt(got, 0); err != nil || string(got) != "Linux" || p.Vaddr != loads[0].virt || p.Paddr != 0x1000 {
		t.Errorf("%q, %+v, %v", got, p.ProgHeader, err)
	}
}

// FuzzWalk follows tables of any content: what is found lies in memory, in order.
func FuzzWalk(f *testing.F) {
	f.Add([]byte("\x01\x10\x00\x00\x00\x00\x00\x00"), uint64(0), uint64(cr4PAE), uint64(eferLMA))
	f.Add([]byte("\x83\x00\x00\x00\x01\x10\x00\x00"), uint64(0), uint64(cr4PSE), uint64(0))
	f.Fuzz(func(t *testing.T, b []byte, cr3, cr4, efer uint64) {
		ram := make([]byte, 8*pg)
		copy(ram, b)
		mem := []physRange{{gpa: 0, bytes: 4 * pg, offset: 4 * pg}, {gpa: 6 * pg, bytes: 2 * pg}}
		w := &walker{mem: mem, load: func(_ physRange, off uint64) ([]byte, error) { return ram[off&^(pg-1):][:pg], nil }}
		w.tables = maxTables - 1000 // a short leash: the limit is the same
		found, err := w.all([]vmstate.CPU{{CR: [5]uint64{0: cr0Paging, 3: cr3, 4: cr4}, EFER: efer}})
		if err != nil {
			return
		}
		for i, m := range found {
			r := mem[m.mem]
			if m.bytes == 0 || m.phys < r.gpa || m.phys+m.bytes > r.end() {
				t.Fatalf("outside: %+v", m)
			}
			if i > 0 && m.virt <= found[i-1].virt+found[i-1].bytes-1 {
				t.Fatalf("out of order: %+v after %+v", m, found[i-1])
			}
		}
	})
}
