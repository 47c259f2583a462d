package pager

import (
	"bufio"
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

// eachMapping calls f for the mappings that touch [start, end).
func eachMapping(pid int, start, end uint64, f func(mapping) error) error {
	file, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return err
	}
	defer file.Close()
	sc := bufio.NewScanner(file)
	sc.Buffer(make([]byte, 4096), 64<<10)
	for sc.Scan() {
		m, ok := parseMapping(sc.Text())
		if !ok || m.end <= start || end <= m.start {
			continue
		}
		if err := f(m); err != nil {
			return err
		}
	}
	return sc.Err()
}

func parseMapping(line string) (m mapping, ok bool) {
	w := strings.Fields(line)
	if len(w) < 5 || len(w[1]) != 4 {
		return m, false
	}
	lo, hi, _ := strings.Cut(w[0], "-")
	var errs [4]error
	m.start, errs[0] = strconv.ParseUint(lo, 16, 64)
	m.end, errs[1] = strconv.ParseUint(hi, 16, 64)
	m.offset, errs[2] = strconv.ParseUint(w[2], 16, 64)
	m.inode, errs[3] = strconv.ParseUint(w[4], 10, 64)
	m.private = w[1][3] == 'p'
	return m, errors.Join(errs[:]...) == nil && m.start < m.end
}

// allAnonymous reports whether [start, end) is private memory with no file behind.
func allAnonymous(pid int, start, end uint64) (bool, error) {
	at, other := start, false
	err := eachMapping(pid, start, end, func(m mapping) error {
		if m.start > at || !m.private || m.inode != 0 {
			other = true
		}
		at = m.end
		return nil
	})
	return !other && at >= end, err
}

// fileHasData reports whether the files behind [start, end) hold anything there.
// Such a page is in no page table, but raises no missing fault either: it would
// simply be read.
func fileHasData(pid int, start, end uint64) (bool, error) {
	found := false
	err := eachMapping(pid, start, end, func(m mapping) error {
		if m.inode == 0 || found {
			return nil
		}
		path := fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, m.start, m.end)
		f, err := os.Open(path)
		if err != nil {
			return fmt.Errorf("look behind the mapping at %#x: %w", m.start, err)
		}
		defer f.Close()
		from := int64(m.offset + max(start, m.start) - m.start)
		to := int64(m.offset + min(end, m.end) - m.start)
		switch at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_DATA); {
		case err == unix.ENXIO:
		case err != nil:
			return fmt.Errorf("look for data behind the mapping at %#x: %w", m.start, err)
		default:
			found = at < to
		}
		return nil
	})
	return found, err
}
