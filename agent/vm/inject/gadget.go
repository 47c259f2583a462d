package inject

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Limits on what is read of a target: a maps file longer than this is cut, and
// no more code than this is searched.
const (
	maxMapsBytes   = 64 << 20
	maxSearchBytes = 96 << 20
)

// mapping is one line of /proc/PID/maps.
type mapping struct {
	start, end uint64
	perms      string
	inode      uint64
	path       string
}

func (m mapping) executable() bool { return strings.HasPrefix(m.perms, "r-x") }
func (m mapping) writable() bool   { return strings.HasPrefix(m.perms, "rw") }

// parseMaps reads the format of /proc/PID/maps; lines it cannot read are an error.
func parseMaps(r io.Reader) ([]mapping, error) {
	var out []mapping
	sc := bufio.NewScanner(io.LimitReader(r, maxMapsBytes))
	sc.Buffer(make([]byte, 0, 8192), 64<<10)
	for sc.Scan() {
		m, err := parseMapping(sc.Text())
		if err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, sc.Err()
}

func parseMapping(line string) (mapping, error) {
	bad := fmt.Errorf("not a line of a maps file: %.80q", line)
	f := strings.Fields(line)
	if len(f) < 5 {
		return mapping{}, bad
	}
	lo, hi, ok := strings.Cut(f[0], "-")
	if !ok {
		return mapping{}, bad
	}
	var m mapping
	var err1, err2, err3 error
	m.start, err1 = strconv.ParseUint(lo, 16, 64)
	m.end, err2 = strconv.ParseUint(hi, 16, 64)
	m.inode, err3 = strconv.ParseUint(f[4], 10, 64)
	if err1 != nil || err2 != nil || err3 != nil || m.end < m.start {
		return mapping{}, bad
	}
	m.perms = f[1]
	if len(f) > 5 {
		m.path = strings.Join(f[5:], " ")
	}
	return m, nil
}

func readMaps(pid int) ([]mapping, error) {
	f, err := os.Open("/proc/" + strconv.Itoa(pid) + "/maps")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseMaps(f)
}

// rankCode orders mappings by how likely they hold what is looked for, and how
// likely they stay mapped.
func rankCode(m mapping) int {
	base := m.path[strings.LastIndexByte(m.path, '/')+1:]
	switch {
	case strings.HasPrefix(base, "libc.so"), strings.HasPrefix(base, "libc-"), strings.HasPrefix(base, "ld-musl"):
		return 0
	case strings.HasPrefix(base, "libpthread"), strings.HasPrefix(base, "ld-linux"), strings.HasPrefix(base, "ld-"):
		return 1
	case m.path == "[vdso]":
		return 2
	}
	return 3
}

// findGadgets searches the file-backed code of a process. Anonymous code is left
// out: a translator such as TCG rewrites it at any time.
func findGadgets(mem io.ReaderAt, maps []mapping) (gadgets, error) {
	var code []mapping
	for _, m := range maps {
		if m.executable() && (m.inode != 0 || m.path == "[vdso]") {
			code = append(code, m)
		}
	}
	slices.SortStableFunc(code, func(a, b mapping) int { return rankCode(a) - rankCode(b) })
	var g gadgets
	budget := uint64(maxSearchBytes)
	for _, m := range code {
		n := min(m.end-m.start, budget)
		budget -= n
		if err := searchCode(mem, m.start, n, &g); err != nil {
			return gadgets{}, err
		}
		if g.call != 0 && g.signalReturn != 0 {
			return g, nil
		}
		if budget == 0 {
			break
		}
	}
	if !g.complete() {
		return gadgets{}, errors.New("no `syscall; ret` with a way to rt_sigreturn in its code")
	}
	return g, nil
}

// searchCode fills the fields of g that are still empty from one range.
func searchCode(mem io.ReaderAt, start, length uint64, g *gadgets) error {
	const chunk, overlap = 1 << 20, 16
	buf := make([]byte, min(length, chunk+overlap))
	for off := uint64(0); off < length; off += chunk {
		b := buf[:min(length-off, chunk+overlap)]
		n, err := mem.ReadAt(b, int64(start+off))
		if err != nil && n == 0 {
			if errors.Is(err, io.EOF) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EFAULT) {
				return nil // a page of a truncated file: look elsewhere
			}
			return err
		}
		for _, p := range codePatterns {
			if f := p.field(g); *f == 0 {
				if i := bytes.Index(b[:n], p.bytes); i >= 0 {
					*f = start + off + uint64(i)
				}
			}
		}
		if g.call != 0 && g.signalReturn != 0 {
			return nil
		}
	}
	return nil
}

// verifyGadgets re-reads the few bytes that will be executed: between the search
// and the stop the target may have unmapped a library.
func verifyGadgets(mem io.ReaderAt, g gadgets) bool {
	var b [9]byte
	for _, p := range codePatterns {
		addr := *p.field(&g)
		if addr == 0 {
			continue
		}
		if n, _ := mem.ReadAt(b[:len(p.bytes)], int64(addr)); n != len(p.bytes) {
			return false
		}
		if !bytes.Equal(b[:len(p.bytes)], p.bytes) && !otherPattern(g, addr, b[:]) {
			return false
		}
	}
	return true
}

// otherPattern: two patterns may fill the same field.
func otherPattern(g gadgets, addr uint64, b []byte) bool {
	for _, p := range codePatterns {
		if *p.field(&g) == addr && bytes.HasPrefix(b, p.bytes) {
			return true
		}
	}
	return false
}
