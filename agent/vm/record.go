package vm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// QEMU keeps one record per RAM block in its heap (struct RAMBlock, unchanged in
// this part from 2.x to 10.x):
//
//	host, colo_cache *; offset, used_length, max_length uint64; resized *;
//	flags uint32; idstr [256]char; next {le_next, le_prev *}
//
// `info ramblock` names offset, used, total and idstr of every block, so a record
// can be recognised by content, wherever a build puts it: these three numbers in
// a row, the name with its terminator close behind, and before them an address
// at which a mapping of exactly the right size starts. The list pointers are only
// used to find the neighbours quickly; each is checked in the same way. What lies in
// the heap may come from the guest (packet buffers), which is why a record is only
// believed when it names a mapping of the block's exact size, why two records that
// disagree end the search, and why addresses QEMU itself tells are compared with it.
const (
	recordHostBefore  = 16  // host lies two pointers before offset
	recordNameWithin  = 128 // idstr starts at most this far behind offset
	recordIDBytes     = 256 // sizeof(idstr), fixed by the migration stream
	recordReadBytes   = recordHostBefore + recordNameWithin + recordIDBytes + 24
	recordChunkBytes  = 256 << 10
	recordSearchLimit = 512 << 20 // bytes of heap looked at, all blocks together
	recordArenaLimit  = 128 << 20 // larger mappings are not malloc arenas
	maxSameKey        = 64        // blocks without size at one offset; in fact there is one
)

var errNoRecord = errors.New("no record of it in QEMU's heap")

// recordFinder looks for RAMBlock records in a process's writable memory.
type recordFinder struct {
	mem    io.ReaderAt
	arenas []VMA // where to look, likeliest first
	vmas   []VMA // all mappings, to check host addresses
	budget int64
	buf    []byte
}

func newRecordFinder(mem io.ReaderAt, vmas []VMA) *recordFinder {
	f := &recordFinder{mem: mem, vmas: vmas, budget: recordSearchLimit}
	var rest []VMA
	for _, v := range vmas {
		switch {
		case v.Perms != "rw-p" || v.Inode != 0 || v.Bytes() > recordArenaLimit && v.Path != "[heap]":
		case v.Path == "[heap]":
			f.arenas = append(f.arenas, v)
		case v.Path == "":
			rest = append(rest, v)
		}
	}
	f.arenas = append(f.arenas, rest...)
	return f
}

// find returns the host address of each block it can, by name. A block whose
// records disagree is an error. seed is where one of the records may be (see seed),
// or 0; it is believed no more than any other.
func (f *recordFinder) find(lines []ramblockLine, seed uint64) (map[string]uint64, error) {
	found := make(map[string]uint64, len(lines))
	byKey := make(map[[24]byte][]*ramblockLine, len(lines))
	for i := range lines {
		k := recordKey(&lines[i])
		byKey[k] = append(byKey[k], &lines[i])
	}
	if seed != 0 {
		if err := f.follow(seed, byKey, found); err != nil {
			return nil, err
		}
	}
	for i := range lines {
		if _, ok := found[lines[i].name]; ok {
			continue
		}
		at, err := f.search(&lines[i], false)
		if errors.Is(err, errNoRecord) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := f.follow(at, byKey, found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

func recordKey(b *ramblockLine) (k [24]byte) {
	binary.LittleEndian.PutUint64(k[0:], b.offset)
	binary.LittleEndian.PutUint64(k[8:], b.used)
	binary.LittleEndian.PutUint64(k[16:], b.total)
	return k
}

// seed looks for the record of a block whose offset is not known yet, so that the
// search need not wait for the monitor; 0 if there is none.
func (f *recordFinder) seed(b *RAMBlock) uint64 {
	at, err := f.search(&ramblockLine{name: b.Name, pageBytes: 4096, used: b.UsedBytes, total: b.TotalBytes}, true)
	if err != nil {
		return 0
	}
	return at
}

// search scans the arenas for one block's record, of any offset or of b's; the
// result is the address of its offset field.
func (f *recordFinder) search(b *ramblockLine, anyOffset bool) (uint64, error) {
	if f.buf == nil {
		f.buf = make([]byte, recordChunkBytes+recordReadBytes)
	}
	for _, a := range f.arenas {
		for at := a.Start; at < a.End; at += recordChunkBytes {
			want := min(a.End-at, uint64(len(f.buf)))
			if f.budget -= int64(want); f.budget < 0 {
				return 0, fmt.Errorf("%q: %w within %d bytes", b.name, errNoRecord, recordSearchLimit)
			}
			n, err := f.mem.ReadAt(f.buf[:want], int64(at))
			if n == 0 && err != nil {
				break // an arena with holes or one that shrank: nothing to find here
			}
			chunk := f.buf[:n]
			// Word by word: bytes.Index is slow on heaps, which are full of the
			// zeros that the numbers begin with.
			for i := 16; i+8 <= min(len(chunk), recordChunkBytes+16); i += 8 {
				if binary.LittleEndian.Uint64(chunk[i:]) != b.total || binary.LittleEndian.Uint64(chunk[i-8:]) != b.used {
					continue
				}
				want := *b
				if offset := binary.LittleEndian.Uint64(chunk[i-16:]); anyOffset {
					want.offset = offset
				} else if offset != b.offset {
					continue
				}
				field := at + uint64(i-16)
				if _, _, err := f.check(field, &want); err == nil {
					return field, nil
				}
			}
		}
	}
	return 0, fmt.Errorf("%q: %w", b.name, errNoRecord)
}

// check reads what lies around an offset field and proves that it is b's record:
// host address and offset of the name within the record.
func (f *recordFinder) check(field uint64, b *ramblockLine) (host uint64, nameOff int, err error) {
	raw, err := f.read(field)
	if err != nil {
		return 0, 0, err
	}
	key := recordKey(b)
	if !bytes.Equal(raw[recordHostBefore:recordHostBefore+24], key[:]) {
		return 0, 0, errNoRecord
	}
	body := raw[recordHostBefore:]
	name := append([]byte(b.name), 0)
	i := bytes.Index(body[24:min(len(body), recordNameWithin+len(name))], name)
	if i < 0 {
		return 0, 0, errNoRecord
	}
	host = binary.LittleEndian.Uint64(raw)
	if vmasAt(f.vmas, host, b.mapBytes()) == nil {
		return 0, 0, errNoRecord
	}
	return host, 24 + i, nil
}

// read returns recordReadBytes (fewer at the end of a mapping, but always the
// numbers) from host on.
func (f *recordFinder) read(field uint64) ([]byte, error) {
	raw := make([]byte, recordReadBytes)
	n, err := f.mem.ReadAt(raw, int64(field-recordHostBefore))
	if n < recordHostBefore+24 {
		return nil, errors.Join(errNoRecord, err)
	}
	return raw[:n], nil
}

// follow walks the list both ways from a proven record and adds every block whose
// record proves itself. A pointer that leads elsewhere ends the walk: the caller
// searches for what is still missing.
func (f *recordFinder) follow(field uint64, byKey map[[24]byte][]*ramblockLine, found map[string]uint64) error {
	for _, forward := range []bool{true, false} {
		at := field
		for range len(byKey) * maxSameKey { // a list made to run in circles ends too
			raw, err := f.read(at)
			if err != nil {
				break
			}
			b, host, nameOff := f.identify(at, raw, byKey)
			if b == nil {
				break
			}
			if old, ok := found[b.name]; ok && old != host {
				return fmt.Errorf("%w: two records of block %q: 0x%x and 0x%x", errAmbiguous, b.name, old, host)
			}
			found[b.name] = host
			// The pointers follow the name, aligned; le_prev points at the
			// previous record's le_next, le_next at the start of the next.
			next := recordHostBefore + (nameOff+recordIDBytes+7)&^7
			if next+16 > len(raw) {
				break
			}
			// start of the record -> offset field: 16 (rcu) + 8 (mr) + 16
			const startToField = 40
			if forward {
				p := binary.LittleEndian.Uint64(raw[next:])
				if p == 0 {
					break
				}
				at = p + startToField
			} else {
				p := binary.LittleEndian.Uint64(raw[next+8:])
				if p == 0 {
					break
				}
				at = p - uint64(next-recordHostBefore)
			}
		}
	}
	return nil
}

// identify finds which block a record belongs to, or nil.
func (f *recordFinder) identify(at uint64, raw []byte, byKey map[[24]byte][]*ramblockLine) (*ramblockLine, uint64, int) {
	for _, b := range byKey[[24]byte(raw[recordHostBefore:recordHostBefore+24])] {
		if host, nameOff, err := f.check(at, b); err == nil {
			return b, host, nameOff
		}
	}
	return nil, 0, 0
}

// processMemory reads a process's memory at its addresses. process_vm_readv copies
// once, /proc/PID/mem twice and page by page.
type processMemory struct{ pid int }

// ReadAt implements io.ReaderAt.
func (m processMemory) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		local := []unix.Iovec{{Base: &p[n]}}
		local[0].SetLen(len(p) - n)
		k, err := unix.ProcessVMReadv(m.pid, local, []unix.RemoteIovec{{Base: uintptr(off) + uintptr(n), Len: len(p) - n}}, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err == nil && k <= 0 {
			err = unix.EFAULT
		}
		if err != nil {
			return n, fmt.Errorf("read %d bytes at %#x of process %d: %w", len(p)-n, off+int64(n), m.pid, err)
		}
		n += k
	}
	return n, nil
}
