package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/bpf/probe"
	"github.com/ckagent/ckagent/uffd"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// healthy is a host without any gap; tests take things away from it.
func healthy() *Facts {
	f := &Facts{
		Kernel: "6.18.0", Arch: "amd64", Scan: true, KSM: 0,
		Uffd:      UffdFacts{Features: 1<<17 - 1, Unprivileged: 0},
		HugePages: HugePageFacts{Transparent: "madvise"},
		KVM:       KVMFacts{Hardware: true},
		Cgroup:    CgroupFacts{V2: "/sys/fs/cgroup", V2Freeze: true},
		Rights:    RightsFacts{Caps: 1<<41 - 1, PtraceScope: 1, MemlockBytes: 8 << 20},
		QEMU:      []QEMUFacts{{Path: "/usr/bin/qemu-system-x86_64", Version: "10.0.3"}},
		Tools:     []ToolFacts{{Name: "qemu-img", Path: "/usr/bin/qemu-img"}},
		Store: StoreFacts{Path: "/var/lib/ckagent", Probed: "/var/lib/ckagent", Exists: true, IsDir: true, Mode: 0o700,
			FSType: "ext4", FreeBytes: 100 << 30, TotalBytes: 200 << 30, SyncMedian: time.Millisecond, SyncMax: 2 * time.Millisecond},
	}
	for _, n := range probe.Names() {
		f.BPF = append(f.BPF, probe.Result{Name: n, OK: true, Detail: "works"})
	}
	return f
}

func TestHealthy(t *testing.T) {
	r := Judge(healthy())
	if gaps := r.Gaps(); r.Status != OK || len(gaps) != 0 {
		t.Fatalf("%s %+v", r.Status, gaps)
	}
	if e := r.Engines[0]; e.RAM != "anonymous" || e.Engine != "uffd" || len(e.Modes) != 3 {
		t.Errorf("%+v", e)
	}
}

// TestProofs: where the capture in the kernel was proved it is the engine, where its
// test failed that is said with the cost.
func TestProofs(t *testing.T) {
	f := healthy()
	f.Proofs = []Proof{{Accel: "tcg", RAM: "anonymous", OK: true, Detail: "all right"}, {Accel: "tcg", RAM: "shared", Detail: "a page is not what it was"}}
	r := Judge(f)
	if a, s := r.Engines[0], r.Engines[1]; a.Engine != "bpf" || !strings.Contains(a.Reason, "tcg") || s.Engine != "uffd" {
		t.Errorf("%+v", r.Engines)
	}
	c := r.Find("bpf", "capture in the kernel, tcg, shared RAM")
	if c == nil || c.Status != Missing || !strings.Contains(c.Detail, "not what it was") || c.Costs == "" || c.Mend == "" {
		t.Errorf("%+v", c)
	}
	if c := r.Find("bpf", "capture in the kernel, tcg, anonymous RAM"); c == nil || c.Status != OK {
		t.Errorf("%+v", c)
	}
	f.Proofs[0] = Proof{Accel: "tcg", RAM: "anonymous", Late: true, Detail: "out\nof time"}
	r = Judge(f)
	if c := r.Find("bpf", "capture in the kernel, tcg, anonymous RAM"); c == nil || c.Status != Limited || !strings.Contains(c.Detail, "out of time") || !strings.Contains(c.Mend, "less busy") || r.Engines[0].Engine != "uffd" {
		t.Errorf("a test that came to no end: %+v", c)
	}
	f.Proofs, f.ProofErr = nil, unix.EPERM
	if c := Judge(f).Find("bpf", "capture in the kernel"); c == nil || c.Status != Missing {
		t.Errorf("%+v", c)
	}
}

func TestGaps(t *testing.T) {
	lose := func(bits uffd.Features) func(*Facts) { return func(f *Facts) { f.Uffd.Features &^= bits } }
	dropCap := func(bit int) func(*Facts) { return func(f *Facts) { f.Rights.Caps &^= 1 << bit } }
	for _, c := range []struct {
		name        string
		change      func(*Facts)
		group, gap  string
		status      Status
		overall     Status
		says        string // in detail, costs or mend
		anon, memfd string // engines
	}{
		{"other architecture", func(f *Facts) { f.Arch = "arm64" }, "kernel", "architecture", Missing, Missing, "x86-64", "none", "none"},
		{"no device", func(f *Facts) { f.Uffd.DeviceErr = unix.ENOENT }, "kernel", "userfaultfd", Limited, Limited, "vm.unprivileged_userfaultfd=1", "uffd", "uffd"},
		{"no device but sysctl", func(f *Facts) { f.Uffd.DeviceErr, f.Uffd.Unprivileged = unix.ENOENT, 1 }, "", "", OK, OK, "", "uffd", "uffd"},
		{"no userfaultfd", func(f *Facts) {
			f.Uffd = UffdFacts{DeviceErr: unix.ENOENT, SyscallErr: unix.ENOSYS, FeaturesErr: unix.ENOSYS, Unprivileged: -1,
				WPAnonErr: unix.ENOSYS, WPSharedErr: unix.ENOSYS, MissingAnonErr: unix.ENOSYS, MissingSharedErr: unix.ENOSYS}
		}, "kernel", "userfaultfd", Missing, Missing, "not implemented", "none", "none"},
		{"no WP", lose(uffd.FeaturePagefaultFlagWP), "kernel", "write protection, anonymous", Missing, Missing, "PAGEFAULT_FLAG_WP", "none", "uffd"},
		{"no shared WP", lose(uffd.FeatureWPHugetlbfsShmem), "kernel", "write protection, shared", Missing, OK, "5.19", "uffd", "none"},
		{"shared WP refused", func(f *Facts) { f.Uffd.WPSharedErr = unix.EINVAL }, "kernel", "write protection, shared", Missing, OK, "invalid argument", "uffd", "none"},
		{"no unpopulated", lose(uffd.FeatureWPUnpopulated), "kernel", "marks on absent pages", Missing, OK, "6.4", "none", "none"},
		{"no async", lose(uffd.FeatureWPAsync), "kernel", "asynchronous tracking", Missing, OK, "full one", "uffd", "uffd"},
		{"no scan", func(f *Facts) { f.Scan = false }, "kernel", "PAGEMAP_SCAN", Missing, OK, "6.7", "none", "none"},
		{"no discard events", lose(uffd.FeatureEventRemove), "kernel", "announced discards", Missing, OK, "balloon", "uffd", "uffd"},
		{"missing faults half", func(f *Facts) { f.Uffd.MissingSharedErr = unix.EINVAL }, "kernel", "missing faults", Limited, Limited, "eagerly", "uffd", "uffd"},
		{"no missing faults", func(f *Facts) { f.Uffd.MissingSharedErr, f.Uffd.MissingAnonErr = unix.EPERM, unix.EPERM }, "kernel", "missing faults", Missing, Missing, "no lazy restore", "uffd", "uffd"},
		{"no collapse", func(f *Facts) { f.Collapse = unix.EINVAL }, "kernel", "collapse of split pages", Missing, OK, "6.1", "uffd", "uffd"},
		{"no tcx", func(f *Facts) {
			f.BPF[5] = probe.Result{Name: "tcx", Detail: "not in this kernel", Costs: "slots", Mend: "6.6"}
		}, "bpf", "tcx", Missing, OK, "not in this kernel", "uffd", "uffd"},
		{"no kvm", func(f *Facts) { f.KVM.OpenErr = unix.ENOENT }, "host", "KVM", Missing, OK, "kvm_intel", "uffd", "uffd"},
		{"kvm refuses", func(f *Facts) { f.KVM.CreateErr = unix.EOPNOTSUPP }, "host", "KVM", Missing, OK, "no virtual machine can be made", "uffd", "uffd"},
		{"kvm useless", func(f *Facts) { f.KVM.RealErr = unix.EIO }, "host", "KVM", Missing, OK, "16-bit", "uffd", "uffd"},
		{"kvm nested and small", func(f *Facts) { f.KVM.LongErr, f.KVM.Nested = unix.ETIMEDOUT, true }, "host", "KVM", Limited, OK, "no 64-bit guests", "uffd", "uffd"},
		{"kvm without hardware", func(f *Facts) { f.KVM.Hardware, f.KVM.Nested = false, true }, "host", "KVM", Limited, OK, "neither vmx nor svm", "uffd", "uffd"},
		{"no cgroups", func(f *Facts) { f.Cgroup = CgroupFacts{} }, "host", "control groups", Missing, OK, "none mounted", "uffd", "uffd"},
		{"cgroup read-only", func(f *Facts) { f.Cgroup.V2Write = unix.EROFS }, "host", "control groups", Limited, OK, "Delegate", "uffd", "uffd"},
		{"no freezer", func(f *Facts) { f.Cgroup.V2Freeze = false }, "host", "freezer", Missing, OK, "5.2", "uffd", "uffd"},
		{"merging", func(f *Facts) { f.KSM = 1 }, "host", "same-page merging", Limited, OK, "mem-merge=off", "uffd", "uffd"},
		{"not root", func(f *Facts) { f.Rights = RightsFacts{EUID: 1000, MemlockBytes: 64 << 10, PtraceScope: 0} }, "rights", "user", Limited, Limited, "root", "uffd", "uffd"},
		{"no net admin", dropCap(unix.CAP_NET_ADMIN), "rights", "capabilities", Limited, Limited, "CAP_NET_ADMIN", "uffd", "uffd"},
		{"ptrace forbidden", func(f *Facts) { f.Rights.PtraceScope = 3 }, "rights", "ptrace", Missing, Missing, "reboot", "none", "none"},
		{"ptrace restricted", func(f *Facts) { f.Rights.Caps &^= 1 << unix.CAP_SYS_PTRACE }, "rights", "ptrace", Missing, Missing, "ptrace_scope=1", "none", "none"},
		{"memlock", func(f *Facts) { f.Rights.Caps &^= 1 << unix.CAP_IPC_LOCK }, "rights", "locked memory", Limited, Limited, "LimitMEMLOCK", "uffd", "uffd"},
		{"no qemu", func(f *Facts) { f.QEMU = nil }, "qemu", "qemu-system-*", Missing, Missing, "apt install", "uffd", "uffd"},
		{"old qemu", func(f *Facts) { f.QEMU[0].Version = "6.2.0" }, "qemu", "/usr/bin/qemu-system-x86_64", Limited, OK, "older", "uffd", "uffd"},
		{"odd qemu", func(f *Facts) { f.QEMU[0].Version, f.QEMU[0].Err = "", errors.New("killed") }, "qemu", "/usr/bin/qemu-system-x86_64", Missing, OK, "killed", "uffd", "uffd"},
		{"no tool", func(f *Facts) { f.Tools[0].Path = "" }, "tools", "qemu-img", Missing, OK, "not found", "uffd", "uffd"},
		{"store hangs", func(f *Facts) { f.Store = StoreFacts{Path: "/mnt", Hung: true} }, "store", "directory", Missing, Missing, "does not answer", "uffd", "uffd"},
		{"store is a file", func(f *Facts) { f.Store.IsDir = false }, "store", "directory", Missing, Missing, "not a directory", "uffd", "uffd"},
		{"store read-only", func(f *Facts) { f.Store.WriteErr = unix.EROFS }, "store", "directory", Missing, Missing, "read-only", "uffd", "uffd"},
		{"store open to all", func(f *Facts) { f.Store.Mode = 0o755 }, "store", "directory", Limited, Limited, "0700", "uffd", "uffd"},
		{"store in memory", func(f *Facts) { f.Store.Volatile = true }, "store", "filesystem", Limited, Limited, "reboot", "uffd", "uffd"},
		{"store remote", func(f *Facts) { f.Store.Network = true }, "store", "filesystem", Limited, Limited, "hangs", "uffd", "uffd"},
		{"store small", func(f *Facts) { f.Store.FreeBytes = 100 << 20 }, "store", "space", Limited, Limited, "100.0 MiB", "uffd", "uffd"},
		{"store full", func(f *Facts) { f.Store.FreeBytes = 0 }, "store", "space", Missing, Missing, "make room", "uffd", "uffd"},
		{"store slow", func(f *Facts) { f.Store.SyncMedian = time.Second }, "store", "fsync", Limited, Limited, "faster disk", "uffd", "uffd"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := healthy()
			c.change(f)
			r := Judge(f)
			if r.Status != c.overall {
				t.Errorf("overall %s, want %s", r.Status, c.overall)
			}
			for _, g := range r.Gaps() {
				if g.Costs == "" || g.Mend == "" || g.Detail == "" {
					t.Errorf("a gap must be explained: %+v", g)
				}
			}
			if c.gap == "" {
				if g := r.Gaps(); len(g) != 0 {
					t.Errorf("%+v", g)
				}
			} else {
				got := r.Find(c.group, c.gap)
				if got == nil {
					t.Fatalf("no check %s/%s", c.group, c.gap)
				}
				if got.Status != c.status || !strings.Contains(got.Detail+"|"+got.Costs+"|"+got.Mend, c.says) {
					t.Errorf("%+v", *got)
				}
			}
			if r.Engines[0].Engine != c.anon || r.Engines[1].Engine != c.memfd {
				t.Errorf("engines %+v", r.Engines[:2])
			}
		})
	}
}

// TestLinux61 is the host that Debian 12 makes by itself.
func TestLinux61(t *testing.T) {
	f := healthy()
	f.Kernel, f.Scan = "6.1.0-40-cloud-amd64", false
	f.Uffd.Features = 1<<13 - 1
	r := Judge(f)
	want := map[string]bool{"marks on absent pages": true, "asynchronous tracking": true, "PAGEMAP_SCAN": true}
	for _, g := range r.Gaps() {
		if !want[g.Name] {
			t.Errorf("unexpected gap %+v", g)
		}
		delete(want, g.Name)
	}
	if len(want) != 0 || r.Status != OK {
		t.Errorf("%v %s", want, r.Status)
	}
	for _, e := range r.Engines[:3] {
		if e.Engine != "none" || strings.Join(e.Modes, ",") != "stop,buffer" ||
			e.Reason != "this kernel has no marks on absent pages, no PAGEMAP_SCAN" {
			t.Errorf("%+v", e)
		}
	}
}

func TestRenderings(t *testing.T) {
	f := healthy()
	f.Scan = false
	r := Judge(f)
	var text, js bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteJSON(&js); err != nil {
		t.Fatal(err)
	}
	var back Report
	if err := json.Unmarshal(js.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if back.Schema != Schema || back.Status != r.Status || len(back.Checks) != len(r.Checks) || back.Store.FsyncMedianNS != int64(time.Millisecond) {
		t.Errorf("%+v", back)
	}
	for _, c := range r.Checks {
		if !strings.Contains(text.String(), c.Name) || !strings.Contains(text.String(), c.Detail) {
			t.Errorf("the text lacks %s", c.Name)
		}
	}
	if strings.Contains(text.String(), "\x1b") {
		t.Error("colours in plain text")
	}
	// Aligned: the detail of every check of a group starts in one column.
	var at []int
	for line := range strings.Lines(text.String()) {
		for _, d := range []string{"WP_ASYNC", "EVENT_REMOVE", "costs: what a write"} {
			if i := strings.Index(line, d); i > 0 {
				at = append(at, i)
			}
		}
	}
	if len(at) != 3 || at[0] != at[1] || at[1] != at[2] {
		t.Errorf("columns %v", at)
	}
}

// TestReal looks at this very host and compares with what can be told otherwise.
func TestReal(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f := Gather(t.Context(), Options{StoreDir: dir})
	r := Judge(f)
	var text bytes.Buffer
	if err := r.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	t.Log("\n" + text.String())
	for _, g := range r.Gaps() {
		if g.Costs == "" || g.Mend == "" || g.Detail == "" {
			t.Errorf("a gap must be explained: %+v", g)
		}
	}
	if features, err := uffd.Probe(); err == nil {
		if got := r.Find("kernel", "asynchronous tracking").Status == OK; got != features.Has(uffd.FeatureWPAsync) {
			t.Error("WP_ASYNC")
		}
		if f.Uffd.WPAnonErr != nil && features.Has(uffd.FeaturePagefaultFlagWP) {
			t.Error(f.Uffd.WPAnonErr)
		}
	}
	if _, err := os.Stat("/dev/kvm"); err != nil && r.Find("host", "KVM").Status != Missing {
		t.Error("KVM without a device")
	}
	if f.Store.SyncMedian <= 0 || f.Store.WriteErr != nil || f.Store.TotalBytes == 0 {
		t.Errorf("%+v", f.Store)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestStorePlaces(t *testing.T) {
	dir := t.TempDir()
	s := measureStore(filepath.Join(dir, "a", "b"))
	if s.Exists || s.Probed != dir || s.WriteErr != nil || s.SyncMedian <= 0 {
		t.Errorf("to be made: %+v", s)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s = measureStore(file); !s.Exists || s.IsDir {
		t.Errorf("a file: %+v", s)
	}
	if s = measureStore(filepath.Join(file, "x")); s.WriteErr == nil {
		t.Errorf("below a file: %+v", s)
	}
	if s = measureStore("/dev/shm"); s.FSType != "" && s.FSType == "tmpfs" != s.Volatile {
		t.Errorf("%+v", s)
	}
	if s = measureStore("/proc"); s.WriteErr == nil {
		t.Errorf("/proc takes files: %+v", s)
	}
}

func TestQEMUVersions(t *testing.T) {
	dir := t.TempDir()
	fake := func(name, script string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
		return p
	}
	ctx := t.Context()
	if q := askVersion(ctx, fake("good", "echo 'QEMU emulator version 10.0.3 (Debian 1:10.0.3)'")); q.Version != "10.0.3" || q.Err != nil {
		t.Errorf("%+v", q)
	}
	if q := askVersion(ctx, fake("odd", "echo hello")); q.Err == nil {
		t.Errorf("%+v", q)
	}
	if q := askVersion(ctx, fake("bad", "exit 3")); q.Err == nil {
		t.Errorf("%+v", q)
	}
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if q := askVersion(short, fake("hangs", "exec sleep 60")); q.Err == nil {
		t.Errorf("%+v", q)
	}
	got := gatherQEMU(ctx, []string{filepath.Join(dir, "good"), filepath.Join(dir, "absent")})
	if n := len(got); n < 2 || got[n-2].Version != "10.0.3" || got[n-1].Err == nil {
		t.Errorf("%+v", got)
	}
}

func TestParsers(t *testing.T) {
	g := parseMounts([]byte(`25 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw
26 25 0:23 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct
27 25 0:24 / /sys/fs/cgroup/my\040freezer rw - cgroup cgroup rw,freezer
28 25 0:25 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
29 25 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
garbage
`))
	if g.V2 != "/sys/fs/cgroup/unified" || g.FreezerDir != "/sys/fs/cgroup/my freezer" || strings.Join(g.V1, ",") != "cpu,cpuacct,freezer" {
		t.Errorf("%+v", g)
	}
	own := parseOwnGroups([]byte("4:memory:/a\n0::/user.slice\nbad\n"))
	if own["memory"] != "/a" || own[""] != "/user.slice" || len(own) != 2 {
		t.Errorf("%v", own)
	}
	if caps, nnp := parseStatus([]byte("CapEff:\t000001ffffffffff\nNoNewPrivs:\t1\n")); caps != 1<<41-1 || !nnp {
		t.Errorf("%x %v", caps, nnp)
	}
	if f := cpuFlags("model : x\nflags\t\t: fpu hypervisor sse\nflags : svm\n"); !f["hypervisor"] || f["svm"] || len(cpuFlags("")) != 0 {
		t.Error("cpu flags")
	}
	for in, want := range map[uint64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 3 << 30: "3.0 GiB"} {
		if got := size(in); got != want {
			t.Errorf("%d: %s", in, got)
		}
	}
	// The boot code refers to itself by address.
	if long64[0x41] != 0xb8 || long64[0x78] != 0xff || long64[0x88] != 0x17 || len(long64) != 0x8e {
		t.Errorf("layout of the boot code: %#x bytes", len(long64))
	}
}
