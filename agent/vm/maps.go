package vm

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

// Limits of what is taken from maps and smaps. vm.max_map_count is 65530 by
// default and has been seen raised to a million; a path is at most 4096 bytes,
// four times that when every byte is escaped.
const (
	maxVMAs    = 1 << 21
	maxMapLine = 32 << 10
)

// VMA is one mapping of the process. Addresses, offsets and sizes are bytes.
type VMA struct {
	Start  uint64 `json:"start"`
	End    uint64 `json:"end"`
	Perms  string `json:"perms"` // "rw-p"
	Offset uint64 `json:"offset"`
	Major  uint32 `json:"major"`
	Minor  uint32 `json:"minor"`
	Inode  uint64 `json:"inode"`
	Path   string `json:"path,omitempty"` // as the kernel prints it, "\012" for a newline

	// Only from smaps; Flags is nil otherwise.
	RSSBytes            uint64   `json:"rss_bytes,omitempty"`
	SwapBytes           uint64   `json:"swap_bytes,omitempty"`
	AnonHugeBytes       uint64   `json:"anon_huge_bytes,omitempty"`
	ShmemPMDBytes       uint64   `json:"shmem_pmd_bytes,omitempty"`
	PageBytes           uint64   `json:"page_bytes,omitempty"` // KernelPageSize
	PrivateHugetlbBytes uint64   `json:"private_hugetlb_bytes,omitempty"`
	SharedHugetlbBytes  uint64   `json:"shared_hugetlb_bytes,omitempty"`
	Flags               []string `json:"vm_flags,omitempty"` // two-letter codes of VmFlags
}

// Bytes is the length.
func (v *VMA) Bytes() uint64 { return v.End - v.Start }

// Is reports whether VmFlags has this code ("dc", "uw", ...).
func (v *VMA) Is(flag string) bool { return slices.Contains(v.Flags, flag) }

// Shared reports MAP_SHARED.
func (v *VMA) Shared() bool { return v.Perms[3] == 's' }

// Writable reports PROT_WRITE.
func (v *VMA) Writable() bool { return v.Perms[1] == 'w' }

// Readable reports PROT_READ.
func (v *VMA) Readable() bool { return v.Perms[0] == 'r' }

// Deleted reports that the mapped file has no name any more.
func (v *VMA) Deleted() bool { return strings.HasSuffix(v.Path, " (deleted)") }

// ReadMaps reads /proc/PID/maps: cheap, since no page table is walked.
func (p *Process) ReadMaps() ([]VMA, error) { return p.readVMAs("maps", parseMaps) }

// ReadSmaps reads /proc/PID/smaps: the kernel walks every page table, which costs
// milliseconds per GiB populated in 4 KiB pages, and holds the mmap lock for
// reading while it does. Never within a pause.
func (p *Process) ReadSmaps() ([]VMA, error) { return p.readVMAs("smaps", parseSmaps) }

func (p *Process) readVMAs(name string, parse func(io.Reader) ([]VMA, error)) ([]VMA, error) {
	f, err := os.Open(p.Path(name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	out, err := parse(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", p.Path(name), err)
	}
	// A process that is gone shows an empty file, which must not be mistaken
	// for one without memory.
	if len(out) == 0 {
		return nil, p.gone(name)
	}
	return out, nil
}

func (p *Process) gone(name string) error {
	if err := p.Check(); err != nil {
		return err
	}
	return fmt.Errorf("%s: empty", p.Path(name))
}

func parseMaps(r io.Reader) ([]VMA, error) {
	var out []VMA
	err := eachLine(r, func(line string) error {
		v, err := parseMapLine(line)
		if err != nil {
			return err
		}
		return appendVMA(&out, v)
	})
	return out, err
}

// parseSmaps reads mappings each followed by "Key: value" lines.
func parseSmaps(r io.Reader) ([]VMA, error) {
	var out []VMA
	err := eachLine(r, func(line string) error {
		// Keys start with a capital, addresses with a lower case digit.
		if line != "" && line[0] >= 'A' && line[0] <= 'Z' {
			if len(out) == 0 {
				return fmt.Errorf("%.80q before any mapping", line)
			}
			return parseSmapsField(&out[len(out)-1], line)
		}
		v, err := parseMapLine(line)
		if err != nil {
			return err
		}
		return appendVMA(&out, v)
	})
	return out, err
}

// appendVMA keeps the list ascending and disjoint. The kernel hands smaps out in
// pieces; when mappings change in between, an entry can come twice or overlap.
// That is not a malformed file but a moving target, so the later word counts.
func appendVMA(out *[]VMA, v VMA) error {
	if len(*out) >= maxVMAs {
		return fmt.Errorf("more than %d mappings", maxVMAs)
	}
	for n := len(*out); n > 0 && (*out)[n-1].End > v.Start; n = len(*out) {
		if (*out)[n-1].Start < v.Start {
			(*out)[n-1].End = v.Start
			break
		}
		*out = (*out)[:n-1]
	}
	*out = append(*out, v)
	return nil
}

func eachLine(r io.Reader, do func(string) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(make([]byte, 0, maxMapLine), maxMapLine)
	for s.Scan() {
		if err := do(s.Text()); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("line: %w", err)
	}
	return nil
}

// parseMapLine reads "start-end perms offset major:minor inode   path".
func parseMapLine(line string) (VMA, error) {
	var v VMA
	bad := func(err error) (VMA, error) {
		if err == nil {
			err = errors.New("not a mapping")
		}
		return VMA{}, fmt.Errorf("%.120q: %w", line, err)
	}
	rest := line
	field := func() string {
		f, r, _ := strings.Cut(rest, " ")
		rest = r
		return f
	}
	rng, perms, off, dev, ino := field(), field(), field(), field(), field()
	from, to, ok := strings.Cut(rng, "-")
	if !ok || len(perms) != 4 || !validPerms(perms) {
		return bad(nil)
	}
	major, minor, ok := strings.Cut(dev, ":")
	if !ok {
		return bad(nil)
	}
	var err error
	hex := func(s string, bits int) (n uint64) {
		if err == nil {
			n, err = strconv.ParseUint(s, 16, bits)
		}
		return n
	}
	v.Start, v.End, v.Offset = hex(from, 64), hex(to, 64), hex(off, 64)
	v.Major, v.Minor = uint32(hex(major, 32)), uint32(hex(minor, 32))
	if err == nil {
		v.Inode, err = strconv.ParseUint(ino, 10, 64)
	}
	if err != nil {
		return bad(err)
	}
	if v.End <= v.Start {
		return bad(errors.New("ends before it starts"))
	}
	v.Perms, v.Path = perms, strings.TrimLeft(rest, " ")
	return v, nil
}

func validPerms(p string) bool {
	return (p[0] == 'r' || p[0] == '-') && (p[1] == 'w' || p[1] == '-') &&
		(p[2] == 'x' || p[2] == '-') && (p[3] == 'p' || p[3] == 's')
}

// parseSmapsField takes what is used of "Key:   123 kB" and "VmFlags: rd wr".
func parseSmapsField(v *VMA, line string) error {
	key, val, ok := strings.Cut(line, ":")
	if !ok {
		return fmt.Errorf("%.80q: no key", line)
	}
	var dst *uint64
	switch key {
	case "VmFlags":
		if len(val) > 512 {
			return fmt.Errorf("%.80q: too long", line)
		}
		v.Flags = strings.Fields(val)
		if v.Flags == nil {
			v.Flags = []string{}
		}
		return nil
	case "Rss":
		dst = &v.RSSBytes
	case "Swap":
		dst = &v.SwapBytes
	case "AnonHugePages":
		dst = &v.AnonHugeBytes
	case "ShmemPmdMapped":
		dst = &v.ShmemPMDBytes
	case "KernelPageSize":
		dst = &v.PageBytes
	case "Private_Hugetlb":
		dst = &v.PrivateHugetlbBytes
	case "Shared_Hugetlb":
		dst = &v.SharedHugetlbBytes
	default:
		return nil // the kernel adds keys; those we read are named above
	}
	num, ok := strings.CutSuffix(strings.TrimSpace(val), " kB")
	if !ok {
		return fmt.Errorf("%.80q: not in kB", line)
	}
	n, err := strconv.ParseUint(strings.TrimSpace(num), 10, 54)
	if err != nil {
		return fmt.Errorf("%.80q: %w", line, err)
	}
	*dst = n << 10
	return nil
}

// vmasAt returns the mappings that cover [start, start+length) without a gap and
// with the same permissions and backing, or nil. vmas must be ascending.
func vmasAt(vmas []VMA, start, length uint64) []VMA {
	end := start + length
	if length == 0 || end < start {
		return nil
	}
	i, found := slices.BinarySearchFunc(vmas, start, func(v VMA, a uint64) int {
		switch {
		case v.Start < a:
			return -1
		case v.Start > a:
			return 1
		}
		return 0
	})
	if !found {
		return nil // a block starts where a mapping starts
	}
	first := i
	for at := start; i < len(vmas); i++ {
		v := &vmas[i]
		if v.Start != at || v.End > end || !sameBacking(&vmas[first], v) {
			return nil
		}
		if at = v.End; at == end {
			return vmas[first : i+1]
		}
	}
	return nil
}

// sameBacking reports whether b continues a: same access, same object, offsets in
// step. Splits come from madvise, mbind or a userfaultfd over a part.
func sameBacking(a, b *VMA) bool {
	if a.Perms != b.Perms || a.Major != b.Major || a.Minor != b.Minor || a.Inode != b.Inode {
		return false
	}
	return a.Inode == 0 || b.Offset == a.Offset+(b.Start-a.Start)
}
