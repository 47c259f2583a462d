package source

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// openMapped opens the file that is mapped at addr and returns the offset in it
// that addr shows. It goes through map_files, so that unlinked files and memfds
// are reached too.
func openMapped(pid int, addr uint64) (*os.File, int64, error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, 0, err
	}
	defer maps.Close()
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		start, end, offset, ok := parseMapsLine(lines.Text())
		if !ok || addr < start || addr >= end {
			continue
		}
		f, err := os.Open(fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, start, end))
		if err != nil {
			return nil, 0, err
		}
		return f, int64(offset + addr - start), nil
	}
	if err := lines.Err(); err != nil {
		return nil, 0, err
	}
	return nil, 0, fmt.Errorf("nothing is mapped at %#x", addr)
}

// filled counts the pages of a range of the file that have content, in memory or
// swapped out, at a cost of the range alone. ok is false where the kernel (before
// 6.5) or the file system cannot tell.
func (b *source) filled(first, n uint64) (pages uint64, ok bool) {
	if !b.inMemory {
		return 0, false
	}
	stat, err := cachestat(b.fd, uint64(b.fileOffset)+first*PageBytes, n*PageBytes)
	if err != nil {
		return 0, false
	}
	return stat.cached + stat.evicted, true
}

// livesInMemory reports whether a file has no other content than its page cache
// and swap: tmpfs and memfd.
func livesInMemory(fd int) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(fd, &st) == nil && st.Type == unix.TMPFS_MAGIC
}

// parseMapsLine reads the addresses and the file offset of a line of
// /proc/PID/maps.
func parseMapsLine(line string) (start, end, offset uint64, ok bool) {
	fields := strings.Fields(line)
	if len(fields) < 5 {
		return 0, 0, 0, false
	}
	low, high, found := strings.Cut(fields[0], "-")
	if !found {
		return 0, 0, 0, false
	}
	var errs [3]error
	start, errs[0] = strconv.ParseUint(low, 16, 64)
	end, errs[1] = strconv.ParseUint(high, 16, 64)
	offset, errs[2] = strconv.ParseUint(fields[2], 16, 64)
	return start, end, offset, errors.Join(errs[:]...) == nil && start < end
}

// fileRunsFrom answers from the file: its holes read as zero. Runs before mark
// in out are not merged with. Finding the end of an extent costs its length, so
// ranges that are all content or all hole are told by counting first.
func (b *source) fileRunsFrom(mark int, first, n uint64, out []Run) ([]Run, error) {
	fd := b.fd
	if pages, ok := b.filled(first, n); ok && (pages == 0 || pages == n) {
		return appendRun(out, mark, Run{First: first, Pages: n, Zero: pages == 0}), nil
	}
	at := b.fileOffset + int64(first*PageBytes)
	end := at + int64(n*PageBytes)
	page := func(off int64) uint64 { return uint64(off-b.fileOffset) / PageBytes }
	pageUp := func(off int64) uint64 { return uint64(off-b.fileOffset+PageBytes-1) / PageBytes }
	for at < end {
		data, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end { // no data up to the end
			return appendRun(out, mark, Run{First: page(at), Pages: page(end) - page(at), Zero: true}), nil
		}
		if err != nil {
			return out, fmt.Errorf("find data from offset %d: %w", at, err)
		}
		out = appendRun(out, mark, Run{First: page(at), Pages: page(data) - page(at), Zero: true})
		hole, err := unix.Seek(fd, data, unix.SEEK_HOLE)
		if err != nil {
			return out, fmt.Errorf("find a hole from offset %d: %w", data, err)
		}
		hole = min(hole, end)
		out = appendRun(out, mark, Run{First: page(data), Pages: pageUp(hole) - page(data)})
		at = b.fileOffset + int64(pageUp(hole)*PageBytes)
	}
	return out, nil
}
