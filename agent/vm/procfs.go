package vm

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Cgroup is one line of /proc/PID/cgroup. Hierarchy 0 is cgroup v2.
type Cgroup struct {
	Hierarchy   int      `json:"hierarchy"`
	Controllers []string `json:"controllers,omitempty"` // "name=systemd" for a named v1 hierarchy
	Path        string   `json:"path"`
}

// Limit is a resource limit in the unit the kernel names (bytes, files, us, ...).
type Limit struct {
	Soft uint64 `json:"soft"` // Unlimited when there is none
	Hard uint64 `json:"hard"`
}

// Unlimited is the value of a Limit that is not there.
const Unlimited = math.MaxUint64

var errTooLarge = errors.New("larger than anything the kernel writes there")

// readBounded reads a /proc file of at most limit bytes.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: %w", path, errTooLarge)
	}
	return b, nil
}

type status struct {
	uid, gid   int // effective
	groups     []int
	tracer     int
	noNewPrivs bool
	seccomp    int
}

func parseStatus(raw []byte) (status, error) {
	s := status{uid: -1, gid: -1}
	for line := range strings.Lines(string(raw)) {
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		f := strings.Fields(val)
		num := func(i int) (int, error) {
			if i >= len(f) {
				return 0, fmt.Errorf("status: short line %.80q", line)
			}
			n, err := strconv.Atoi(f[i])
			if err != nil {
				return 0, fmt.Errorf("status: %.80q: %w", line, err)
			}
			return n, nil
		}
		var err error
		switch key {
		case "Uid":
			s.uid, err = num(1)
		case "Gid":
			s.gid, err = num(1)
		case "Groups":
			for i := range f {
				var g int
				if g, err = num(i); err != nil {
					break
				}
				s.groups = append(s.groups, g)
			}
		case "TracerPid":
			s.tracer, err = num(0)
		case "NoNewPrivs":
			var n int
			n, err = num(0)
			s.noNewPrivs = n != 0
		case "Seccomp":
			s.seccomp, err = num(0)
		}
		if err != nil {
			return status{}, err
		}
	}
	if s.uid < 0 || s.gid < 0 {
		return status{}, errors.New("status: no Uid or Gid line")
	}
	return s, nil
}

// parseCmdline splits at NUL. An empty argument is an argument: only the final
// terminator is dropped.
func parseCmdline(raw []byte) []string {
	if len(raw) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
}

func parseCgroups(raw []byte) ([]Cgroup, error) {
	var out []Cgroup
	for line := range strings.Lines(string(raw)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(f) != 3 {
			return nil, fmt.Errorf("cgroup: %.80q", line)
		}
		n, err := strconv.Atoi(f[0])
		if err != nil {
			return nil, fmt.Errorf("cgroup: %.80q: %w", line, err)
		}
		c := Cgroup{Hierarchy: n, Path: f[2]}
		if f[1] != "" {
			c.Controllers = strings.Split(f[1], ",")
		}
		out = append(out, c)
	}
	return out, nil
}

// parseLimits reads /proc/PID/limits, whose columns are separated by two blanks
// or more while names hold single ones.
func parseLimits(raw []byte) (map[string]Limit, error) {
	out := make(map[string]Limit)
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, "Limit ") {
			continue
		}
		const nameWidth = 26 // "%-25s " in fs/proc/base.c
		if len(line) <= nameWidth {
			return nil, fmt.Errorf("limits: %.80q", line)
		}
		f := strings.Fields(line[nameWidth:])
		if len(f) < 2 {
			return nil, fmt.Errorf("limits: %.80q", line)
		}
		var l Limit
		for i, p := range []*uint64{&l.Soft, &l.Hard} {
			if f[i] == "unlimited" {
				*p = Unlimited
				continue
			}
			n, err := strconv.ParseUint(f[i], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("limits: %.80q: %w", line, err)
			}
			*p = n
		}
		out[strings.TrimSpace(line[:nameWidth])] = l
	}
	return out, nil
}

// readNamespaces maps namespace kind to inode ("net:[4026531840]").
func readNamespaces(dir string) (map[string]uint64, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := make(map[string]uint64, len(names))
	for _, n := range names {
		target, err := os.Readlink(dir + "/" + n.Name())
		if errors.Is(err, os.ErrNotExist) {
			continue // a kind this process has none of
		}
		if err != nil {
			return nil, err
		}
		_, ino, ok := strings.Cut(strings.TrimSuffix(target, "]"), ":[")
		if !ok {
			continue
		}
		if v, err := strconv.ParseUint(ino, 10, 64); err == nil {
			out[n.Name()] = v
		}
	}
	return out, nil
}

// Tracer is the pid that traces any thread of the process, 0 when none does. It
// is read anew at each call.
func (p *Process) Tracer() (int, error) {
	tids, err := p.Threads()
	if err != nil {
		return 0, err
	}
	for _, tid := range tids {
		raw, err := readBounded(p.Path("task/"+strconv.Itoa(tid)+"/status"), 1<<20)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread ended meanwhile
		}
		if err != nil {
			return 0, err
		}
		s, err := parseStatus(raw)
		if err != nil {
			return 0, err
		}
		if s.tracer != 0 {
			return s.tracer, nil
		}
	}
	return 0, nil
}

// Threads lists the thread ids.
func (p *Process) Threads() ([]int, error) {
	d, err := os.Open(p.Path("task"))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	tids := make([]int, 0, len(names))
	for _, n := range names {
		if tid, err := strconv.Atoi(n); err == nil {
			tids = append(tids, tid)
		}
	}
	return tids, nil
}

// FD is one open descriptor of the process.
type FD struct {
	Number int
	Target string // what readlink says: a path, "socket:[inode]", "anon_inode:[...]"
	Info   []byte // /proc/PID/fdinfo/N
}

// FDs lists the open descriptors, with fdinfo.
func (p *Process) FDs() ([]FD, error) {
	d, err := os.Open(p.Path("fd"))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	out := make([]FD, 0, len(names))
	for _, n := range names {
		num, err := strconv.Atoi(n)
		if err != nil {
			continue
		}
		target, err := os.Readlink(p.Path("fd/" + n))
		if err != nil {
			continue // closed meanwhile
		}
		info, err := readBounded(p.Path("fdinfo/"+n), 1<<20)
		if err != nil {
			continue
		}
		out = append(out, FD{Number: num, Target: target, Info: info})
	}
	return out, nil
}

// infoField is the value of one "key:\tvalue" line of fdinfo.
func (f FD) infoField(key string) string {
	for line := range strings.Lines(string(f.Info)) {
		if k, v, ok := strings.Cut(line, ":"); ok && k == key {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// Writable reports whether the descriptor was opened for writing.
func (f FD) Writable() bool {
	flags, err := strconv.ParseUint(f.infoField("flags"), 8, 64)
	return err == nil && flags&unix.O_ACCMODE != unix.O_RDONLY
}
