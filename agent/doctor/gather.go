package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ckagent/ckagent/bpf/probe"
	"github.com/ckagent/ckagent/uffd/pagemap"
	"golang.org/x/sys/unix"
)

// DefaultStore is where checkpoints live unless told otherwise.
const DefaultStore = "/var/lib/ckagent"

// stepTime bounds each step of Gather that may hang.
const stepTime = 5 * time.Second

// Options tells Run where to look.
type Options struct {
	StoreDir string   // the store to judge; DefaultStore if empty
	QEMU     []string // further QEMU binaries, beside those found in the usual places
	// Proofs tests the capture in the kernel; nil: it is not looked at.
	Proofs func(ctx context.Context) ([]Proof, error)
}

// Run looks at this host and judges it. An error is only that of ctx.
func Run(ctx context.Context, o Options) (*Report, error) {
	f := Gather(ctx, o)
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return Judge(f), nil
}

// Gather collects the facts about this host.
func Gather(ctx context.Context, o Options) *Facts {
	if o.StoreDir == "" {
		o.StoreDir = DefaultStore
	}
	f := &Facts{Arch: runtime.GOARCH, KSM: readInt("/sys/kernel/mm/ksm/run", -1)}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		f.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	f.Uffd = gatherUffd()
	if pm, err := pagemap.OpenSelf(); err == nil {
		f.Scan = pm.CanScan()
		pm.Close()
	}
	f.Collapse = tryCollapse()
	f.HugePages = gatherHugePages()
	f.BPF = probe.All(ctx)
	if o.Proofs != nil {
		f.Proofs, f.ProofErr = o.Proofs(ctx)
	}
	f.KVM = gatherKVM(ctx)
	f.Cgroup = gatherCgroup()
	f.Rights = gatherRights()
	f.QEMU = gatherQEMU(ctx, o.QEMU)
	f.Tools = gatherTools()
	f.Store = gatherStore(ctx, o.StoreDir)
	return f
}

// tryCollapse splits a huge page of memory of ours and makes it whole again, as
// is done after a checkpoint.
func tryCollapse() error {
	const huge = 2 << 20
	b, err := unix.Mmap(-1, 0, 2*huge, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(b)
	in := b[alignSkip(b, huge):][:huge]
	if err := unix.Madvise(in, unix.MADV_HUGEPAGE); err != nil {
		return err
	}
	in[0] = 1
	one := in[:os.Getpagesize()]
	for _, prot := range []int{unix.PROT_READ, unix.PROT_READ | unix.PROT_WRITE} {
		if err := unix.Mprotect(one, prot); err != nil {
			return err
		}
	}
	err = unix.Madvise(in, unix.MADV_COLLAPSE)
	// Busy or out of huge pages just now: the call exists.
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.EBUSY) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("a split huge page cannot be made whole: %w", err)
	}
	return nil
}

func gatherHugePages() HugePageFacts {
	var h HugePageFacts
	if b, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled"); err == nil {
		if _, s, ok := strings.Cut(string(b), "["); ok {
			h.Transparent, _, _ = strings.Cut(s, "]")
		}
	}
	const pool = "/sys/kernel/mm/hugepages/hugepages-2048kB/"
	h.HugetlbTotal = uint64(max(0, readInt(pool+"nr_hugepages", 0)))
	h.Free = uint64(max(0, readInt(pool+"free_hugepages", 0)))
	return h
}

func gatherRights() RightsFacts {
	r := RightsFacts{EUID: os.Geteuid(), PtraceScope: readInt("/proc/sys/kernel/yama/ptrace_scope", -1)}
	if b, err := os.ReadFile("/proc/self/status"); err == nil {
		r.Caps, r.NoNewPrivs = parseStatus(b)
	}
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) == nil {
		r.MemlockBytes = l.Cur
	}
	return r
}

func parseStatus(b []byte) (caps uint64, noNewPrivs bool) {
	for line := range strings.Lines(string(b)) {
		k, v, _ := strings.Cut(line, ":")
		v = strings.TrimSpace(v)
		switch k {
		case "CapEff":
			caps, _ = strconv.ParseUint(v, 16, 64)
		case "NoNewPrivs":
			noNewPrivs = v == "1"
		}
	}
	return caps, noNewPrivs
}

func gatherCgroup() CgroupFacts {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	own, _ := os.ReadFile("/proc/self/cgroup")
	g := parseMounts(mounts)
	paths := parseOwnGroups(own)
	if g.V2 != "" {
		g.V2Write = unix.Access(filepath.Join(g.V2, paths[""]), unix.W_OK)
		// The root group has no such file; any other has from 5.2 on.
		m, _ := filepath.Glob(filepath.Join(g.V2, "*", "cgroup.freeze"))
		g.V2Freeze = len(m) > 0
		if _, err := os.Stat(filepath.Join(g.V2, paths[""], "cgroup.freeze")); err == nil {
			g.V2Freeze = true
		}
	}
	if g.FreezerDir != "" {
		g.V1Write = unix.Access(g.FreezerDir, unix.W_OK)
	} else if len(g.V1) > 0 {
		g.V1Write = errors.New("no freezer hierarchy")
	}
	return g
}

// parseMounts finds the cgroup hierarchies in mountinfo.
func parseMounts(b []byte) CgroupFacts {
	var g CgroupFacts
	for line := range strings.Lines(string(b)) {
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		switch right[0] {
		case "cgroup2":
			if g.V2 == "" {
				g.V2 = unescape(left[4])
			}
		case "cgroup":
			for o := range strings.SplitSeq(right[2], ",") {
				switch o {
				case "rw", "ro", "xattr", "clone_children", "noprefix", "favordynmods":
					continue
				case "freezer":
					g.FreezerDir = unescape(left[4])
				}
				if !strings.Contains(o, "=") && !slices.Contains(g.V1, o) {
					g.V1 = append(g.V1, o)
				}
			}
		}
	}
	return g
}

// unescape undoes the octal escapes of mountinfo.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// parseOwnGroups maps controller ("" for v2) to our path in its hierarchy.
func parseOwnGroups(b []byte) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		p := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(p) != 3 {
			continue
		}
		for c := range strings.SplitSeq(p[1], ",") {
			out[c] = p[2]
		}
	}
	return out
}

// qemuGlobs are where distributions put QEMU.
var qemuGlobs = []string{
	"/usr/bin/qemu-system-x86_64", "/usr/local/bin/qemu-system-x86_64", "/usr/libexec/qemu-kvm",
	"/usr/bin/kvm", "/usr/bin/qemu-kvm", "/opt/*/bin/qemu-system-x86_64",
}

var qemuVersion = regexp.MustCompile(`version (\d+\.\d+(?:\.\d+)?)`)

func gatherQEMU(ctx context.Context, more []string) []QEMUFacts {
	var paths []string
	if p, err := exec.LookPath("qemu-system-x86_64"); err == nil {
		paths = append(paths, p)
	}
	for _, g := range qemuGlobs {
		m, _ := filepath.Glob(g)
		paths = append(paths, m...)
	}
	var out []QEMUFacts
	seen := map[string]bool{}
	for i, p := range append(paths, more...) {
		real, err := filepath.EvalSymlinks(p)
		if err != nil {
			if i >= len(paths) {
				out = append(out, QEMUFacts{Path: p, Err: err})
			}
			continue
		}
		if seen[real] {
			continue
		}
		seen[real] = true
		out = append(out, askVersion(ctx, p))
	}
	return out
}

func askVersion(ctx context.Context, path string) QEMUFacts {
	ctx, cancel := context.WithTimeout(ctx, stepTime)
	defer cancel()
	q := QEMUFacts{Path: path}
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.WaitDelay = time.Second
	b, err := cmd.Output()
	if err != nil {
		q.Err = err
		return q
	}
	line, _, _ := bufio.NewReader(bytes.NewReader(b)).ReadLine()
	if m := qemuVersion.FindSubmatch(line); m != nil {
		q.Version = string(m[1])
	} else {
		q.Err = errors.New("unknown answer to --version")
	}
	return q
}

func gatherTools() []ToolFacts {
	tools := []ToolFacts{
		{Name: "qemu-img", Use: "copying writable disks, and making and checking those of a restore"},
		{Name: "virsh", Use: "advice by domain name for VMs that libvirt manages"},
	}
	for i := range tools {
		if p, err := exec.LookPath(tools[i].Name); err == nil {
			tools[i].Path = p
		}
	}
	return tools
}

func readInt(path string, missing int) int {
	b, err := os.ReadFile(path)
	if err != nil {
		return missing
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return missing
	}
	return n
}
