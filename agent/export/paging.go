package export

import (
	"cmp"
	"encoding/binary"
	"errors"
	"slices"
	"sort"

	"github.com/ckagent/ckagent/agent/vm/vmstate"
)

// mapping is a piece of a vCPU's virtual memory that is guest memory: in the range
// of this number.
type mapping struct {
	virt, phys, bytes uint64
	mem               int
}

// Bits of control registers and of page table entries.
const (
	cr0Paging  = 1 << 31
	cr4PSE     = 1 << 4
	cr4PAE     = 1 << 5
	cr4LA57    = 1 << 12
	eferLMA    = 1 << 10
	ptePresent = 1 << 0
	pteLarge   = 1 << 7
	pteAddress = 0x000f_ffff_ffff_f000
)

// Page tables come from the guest and may refer to themselves in every way: what is
// read and what is made of it is limited.
const (
	maxTables   = 1 << 17 // 512 MiB of them: they map 256 GiB in pages of 4 KiB
	maxMappings = 1 << 20
)

var errPageTables = errors.New("its page tables are larger than can be followed")

// mappings follows the page tables of every vCPU. Where two vCPUs see different
// memory at one address, the first one's counts.
func (x *exporter) mappings(mem []physRange, cpus []vmstate.CPU) ([]mapping, error) {
	w := &walker{mem: mem, load: x.tablePage}
	found, err := w.all(cpus)
	switch {
	case errors.Is(err, errPageTables):
		return nil, x.refuse("%w", err).WithHint("export without --paging")
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, x.refuse("none of its vCPUs had paging on").WithHint("export without --paging: addresses are physical ones then")
	}
	return found, nil
}

// tablePage reads the page of a range that holds an offset into its block.
func (x *exporter) tablePage(r physRange, offset uint64) ([]byte, error) {
	if err := x.ctx.Err(); err != nil {
		return nil, err
	}
	b := &x.m.Blocks[r.block]
	page := make([]byte, b.PageBytes)
	if _, err := x.r.ReadPage(r.block, offset/b.PageBytes, page); err != nil {
		return nil, err
	}
	in := offset % b.PageBytes &^ (pageBytes - 1)
	return page[in : in+pageBytes], nil
}

// all walks for every vCPU and puts what was found in order.
func (w *walker) all(cpus []vmstate.CPU) ([]mapping, error) {
	for _, c := range cpus {
		if err := w.cpu(c); err != nil {
			return nil, err
		}
	}
	// Stable: the first vCPU comes first at equal addresses.
	slices.SortStableFunc(w.found, func(a, b mapping) int { return cmp.Compare(a.virt, b.virt) })
	out := w.found[:0:0]
	for _, m := range w.found {
		if len(out) > 0 {
			last := out[len(out)-1]
			// Ends are compared without overflow: the last page is at the top.
			if lastByte := last.virt + last.bytes - 1; m.virt <= lastByte {
				if m.virt+m.bytes-1 <= lastByte {
					continue
				}
				cut := lastByte + 1 - m.virt
				m.virt, m.phys, m.bytes = m.virt+cut, m.phys+cut, m.bytes-cut
			}
		}
		out = append(out, m)
	}
	return out, nil
}

// walker is the state of one walk through page tables.
type walker struct {
	mem    []physRange
	load   func(r physRange, offset uint64) ([]byte, error)
	tables int
	roots  []uint64 // CR3 of vCPUs done
	found  []mapping
	first  int // of the found ones of this vCPU
}

// cpu adds what one vCPU maps.
func (w *walker) cpu(c vmstate.CPU) error {
	if c.CR[0]&cr0Paging == 0 || slices.Contains(w.roots, c.CR[3]) {
		return nil
	}
	w.roots = append(w.roots, c.CR[3])
	w.first = len(w.found)
	switch {
	case c.EFER&eferLMA != 0 && c.CR[4]&cr4LA57 != 0:
		return w.table(c.CR[3]&pteAddress, 0, 48, topTable)
	case c.EFER&eferLMA != 0:
		return w.table(c.CR[3]&pteAddress, 0, 39, topTable)
	case c.CR[4]&cr4PAE != 0:
		return w.table(c.CR[3]&0xffff_ffe0, 0, 30, paeTable)
	}
	return w.legacy(c.CR[3]&0xffff_f000, c.CR[4]&cr4PSE != 0)
}

// Kinds of tables of 8-byte entries.
const (
	innerTable = iota
	topTable   // of 64-bit paging: the upper half is at the top of the address space
	paeTable   // top of PAE paging: four entries, none of which is a page
)

// table reads a table, each entry of which stands for 1<<shift bytes.
func (w *walker) table(at, virt uint64, shift uint, kind int) error {
	data, ok, err := w.read(at)
	if err != nil || !ok {
		return err
	}
	from := at % pageBytes
	entries := 512
	if kind == paeTable {
		entries = 4
	}
	for i := range entries {
		pte := binary.LittleEndian.Uint64(data[from+uint64(8*i):])
		if pte&ptePresent == 0 {
			continue
		}
		v := virt | uint64(i)<<shift
		if kind == topTable && i >= entries/2 {
			v |= ^uint64(0) << (shift + 9) // canonical: the top bit goes on upwards
		}
		if shift == 12 || pte&pteLarge != 0 && kind == innerTable && shift <= 30 {
			err = w.add(v, pte&pteAddress&^(1<<shift-1), 1<<shift)
		} else {
			err = w.table(pte&pteAddress, v, shift-9, innerTable)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// legacy reads the two levels of 4-byte entries of 32-bit paging.
func (w *walker) legacy(at uint64, large bool) error {
	dir, ok, err := w.read(at)
	if err != nil || !ok {
		return err
	}
	for i := range uint64(1024) {
		pde := uint64(binary.LittleEndian.Uint32(dir[4*i:]))
		if pde&ptePresent == 0 {
			continue
		}
		if large && pde&pteLarge != 0 {
			// PSE-36: bits 13 to 20 are bits 32 to 39 of the address.
			if err := w.add(i<<22, pde&0xffc0_0000|pde>>13&0xff<<32, 4<<20); err != nil {
				return err
			}
			continue
		}
		tab, ok, err := w.read(pde & 0xffff_f000)
		if err != nil {
			return err
		}
		for k := range uint64(1024) {
			if !ok {
				break
			}
			if pte := uint64(binary.LittleEndian.Uint32(tab[4*k:])); pte&ptePresent != 0 {
				if err := w.add(i<<22|k<<12, pte&0xffff_f000, pageBytes); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// read returns the page of memory that holds a guest-physical address; false if
// there is none.
func (w *walker) read(gpa uint64) ([]byte, bool, error) {
	if w.tables++; w.tables > maxTables {
		return nil, false, errPageTables
	}
	i := w.at(gpa)
	if i < 0 {
		return nil, false, nil
	}
	r := w.mem[i]
	page, err := w.load(r, r.offset+gpa-r.gpa)
	return page, err == nil, err
}

// at finds the range that holds an address; -1 if none does.
func (w *walker) at(gpa uint64) int {
	i := sort.Search(len(w.mem), func(i int) bool { return w.mem[i].end() > gpa })
	if i == len(w.mem) || w.mem[i].gpa > gpa {
		return -1
	}
	return i
}

// add notes what is guest memory of a page, joined to the one before where both
// continue.
func (w *walker) add(virt, phys, bytes uint64) error {
	for i := sort.Search(len(w.mem), func(i int) bool { return w.mem[i].end() > phys }); i < len(w.mem) && w.mem[i].gpa < phys+bytes; i++ {
		from, to := max(phys, w.mem[i].gpa), min(phys+bytes, w.mem[i].end())
		m := mapping{virt + from - phys, from, to - from, i}
		if n := len(w.found); n > w.first {
			if l := &w.found[n-1]; l.mem == i && l.virt+l.bytes == m.virt && l.phys+l.bytes == m.phys {
				l.bytes += m.bytes
				continue
			}
		}
		if len(w.found) == maxMappings {
			return errPageTables
		}
		w.found = append(w.found, m)
	}
	return nil
}
