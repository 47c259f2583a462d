package pager

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mapping is a line of /proc/PID/maps.
type mapping struct {
	start, end uint64
	private    bool
	offset     uint64
	inode      uint64
}

// mappings are those of a process that touch given blocks, in ascending order. A
// QEMU has a thousand others, and reading them all costs half a millisecond with the
// guest waiting: so they are read once for all blocks.
type mappings struct {
	pid  int
	list []mapping
}

func readMappings(pid int, blocks []Block) (*mappings, error) {
	file, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	m := &mappings{pid: pid}
	sc := bufio.NewScanner(file)
	sc.Buffer(make([]byte, 16<<10), 64<<10)
	for sc.Scan() {
		start, end, ok := parseRange(sc.Bytes())
		if !ok || !touches(blocks, start, end) {
			continue
		}
		if one, ok := parseMapping(sc.Text()); ok {
			m.list = append(m.list, one)
		}
	}
	return m, sc.Err()
}

func touches(blocks []Block, start, end uint64) bool {
	for i := range blocks {
		if b := &blocks[i]; start < b.HVA+b.Bytes && b.HVA < end {
			return true
		}
	}
	return false
}

// parseRange reads "start-end " at the beginning of a line.
func parseRange(line []byte) (start, end uint64, ok bool) {
	lo, rest, found := bytes.Cut(line, []byte{'-'})
	hi, _, spaced := bytes.Cut(rest, []byte{' '})
	if !found || !spaced {
		return 0, 0, false
	}
	start, ok = parseHex(lo)
	if !ok {
		return 0, 0, false
	}
	end, ok = parseHex(hi)
	return start, end, ok && start < end
}

// parseHex is strconv.ParseUint(_, 16, 64) without a string to allocate.
func parseHex(b []byte) (n uint64, ok bool) {
	if len(b) == 0 || len(b) > 16 {
		return 0, false
	}
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9':
			n = n<<4 | uint64(c-'0')
		case 'a' <= c && c <= 'f':
			n = n<<4 | uint64(c-'a'+10)
		default:
			return 0, false
		}
	}
	return n, true
}

func parseMapping(line string) (m mapping, ok bool) {
	w := strings.Fields(line)
	if len(w) < 5 || len(w[1]) != 4 {
		return m, false
	}
	m.start, m.end, ok = parseRange([]byte(line))
	var errs [2]error
	m.offset, errs[0] = strconv.ParseUint(w[2], 16, 64)
	m.inode, errs[1] = strconv.ParseUint(w[4], 10, 64)
	m.private = w[1][3] == 'p'
	return m, ok && errors.Join(errs[:]...) == nil
}

// allAnonymous reports whether [start, end) is private memory with no file behind.
func (m *mappings) allAnonymous(start, end uint64) bool {
	at := start
	for _, v := range m.list {
		if v.end <= start || end <= v.start {
			continue
		}
		if v.start > at || !v.private || v.inode != 0 {
			return false
		}
		at = v.end
	}
	return at >= end
}

// fileHasData reports whether the files behind [start, end) hold anything there.
// Such a page is in no page table, but raises no missing fault either: it would
// simply be read.
func (m *mappings) fileHasData(start, end uint64) (bool, error) {
	for _, v := range m.list {
		if v.end <= start || end <= v.start || v.inode == 0 {
			continue
		}
		found, err := v.hasData(m.pid, start, end)
		if err != nil || found {
			return found, err
		}
	}
	return false, nil
}

func (v *mapping) hasData(pid int, start, end uint64) (bool, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, v.start, v.end))
	if err != nil {
		return false, fmt.Errorf("look behind the mapping at %#x: %w", v.start, err)
	}
	defer f.Close()
	from := int64(v.offset + max(start, v.start) - v.start)
	to := int64(v.offset + min(end, v.end) - v.start)
	at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for data behind the mapping at %#x: %w", v.start, err)
	}
	return at < to, nil
}
