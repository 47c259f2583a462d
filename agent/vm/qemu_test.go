package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/guest"
	"golang.org/x/sys/unix"
)

// build is a QEMU to test with.
type build struct {
	name, binary string
	env, args    []string
}

// builds are the QEMUs to test with: the machine's own, and the newer one that the
// guest tools keep in their cache.
func builds(t testing.TB) []build {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	out := []build{{name: "system", binary: path}}
	newer.once.Do(func() { newer.qemu, newer.err = guest.QEMU10(context.Background()) })
	if newer.err != nil {
		t.Logf("QEMU 10 is not tested: %v", newer.err)
		return out
	}
	return append(out, build{"qemu10", newer.qemu.Binary, newer.qemu.Env, newer.qemu.Args})
}

// newer is QEMU 10, unpacked into the cache once.
var newer struct {
	once sync.Once
	qemu guest.QEMU
	err  error
}

// startQEMU runs QEMU with a monitor; it is killed at the test's end.
func startQEMU(t testing.TB, b build, args ...string) *exec.Cmd {
	t.Helper()
	dir, err := os.MkdirTemp("", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "qmp")
	all := append(slices.Clone(b.args), "-display", "none", "-qmp", "unix:"+sock+",server=on,wait=off")
	cmd := exec.Command(b.binary, append(all, args...)...)
	cmd.Env = append(os.Environ(), b.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		os.RemoveAll(dir)
	})
	// The socket is there once QEMU has parsed its command line; the monitor
	// greets once the machine is built.
	deadline := time.Now().Add(20 * time.Second)
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: sock})
		if err == nil {
			// Wait for the greeting: from then on the machine stands.
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			_, err = unix.Poll(p, 20_000)
			n, _, _ := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT)
			unix.Close(fd)
			if err == nil && n > 0 { // not the end of a QEMU that gave up
				return cmd
			}
		} else {
			unix.Close(fd)
		}
		select {
		case <-exited:
			t.Fatalf("QEMU did not start: %s", stderr.String())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("no monitor: %v", err)
		}
	}
}

func openQEMU(t testing.TB, b build, args ...string) *Target {
	t.Helper()
	cmd := startQEMU(t, b, args...)
	tgt, err := Open(t.Context(), cmd.Process.Pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tgt.Close() })
	return tgt
}

func truncated(t testing.TB, dir, name string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func copied(t testing.TB, dir, from string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Skipf("no firmware to test with: %v", err)
	}
	to := filepath.Join(dir, filepath.Base(from))
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

// checkLayout holds a layout against the machine, by QEMU's own account of its
// memory: what pmemsave writes of a page must be what lies at the address found.
func checkLayout(t *testing.T, tgt *Target, blocks []RAMBlock) {
	t.Helper()
	mem, err := os.OpenFile(tgt.Process.Path("mem"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	dump := filepath.Join(t.TempDir(), "page")
	seen := make(map[uint64]string)
	for _, b := range blocks {
		if other, ok := seen[b.HVA]; ok {
			t.Errorf("%s and %s at one address", b.Name, other)
		}
		seen[b.HVA] = b.Name
		if len(b.VMAs) == 0 || b.VMAs[0].Start != b.HVA || b.VMAs[len(b.VMAs)-1].End < b.HVA+b.TotalBytes {
			t.Errorf("%s: mappings %+v do not cover it", b.Name, b.VMAs)
		}
		for _, r := range b.Ranges {
			// The last page of the range: an offset that is off shows there.
			at, gpa := b.HVA+r.Offset+r.Bytes-4096, r.GPA+r.Bytes-4096
			want := make([]byte, 4096)
			if b.Main {
				copy(want, fmt.Sprintf("%s@%x", b.Name, gpa))
				for i := 512; i < len(want); i += 8 {
					want[i] = byte(i) ^ byte(gpa>>12)
				}
				if _, err := mem.WriteAt(want, int64(at)); err != nil {
					t.Fatalf("%s: write at %#x: %v", b.Name, at, err)
				}
			} else if _, err := mem.ReadAt(want, int64(at)); err != nil {
				t.Fatalf("%s: read at %#x: %v", b.Name, at, err)
			}
			if out, err := tgt.QMP.HMP(t.Context(), fmt.Sprintf("pmemsave 0x%x 4096 \"%s\"", gpa, dump)); err != nil || strings.TrimSpace(out) != "" {
				t.Fatalf("pmemsave: %v %s", err, out)
			}
			got, err := os.ReadFile(dump)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s: guest page %#x is not at %#x (found by %s)", b.Name, gpa, at, b.How)
			}
		}
	}
}

// withoutHow strips what a fast resolution does not have to know.
func withoutHow(blocks []RAMBlock) []RAMBlock {
	out := slices.Clone(blocks)
	for i := range out {
		out[i].VMAs, out[i].How = nil, ""
	}
	return out
}

type layoutCase struct {
	name   string
	args   []string
	check  func(t *testing.T, tgt *Target, b map[string]RAMBlock)
	expect map[string]Backing
	refuse []string
}

func layoutCases(t *testing.T) []layoutCase {
	dir := t.TempDir()
	shm, err := os.MkdirTemp("/dev/shm", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shm) })
	var nics []string
	for range 12 {
		nics = append(nics, "-device", "virtio-net-pci")
	}
	cases := []layoutCase{
		{name: "pc", args: []string{"-M", "pc", "-m", "1024"}, expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "q35 two vCPUs", args: []string{"-M", "q35", "-m", "512", "-smp", "2"}, expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "twelve virtio", args: append([]string{"-M", "q35", "-m", "256"}, nics...), expect: map[string]Backing{"pc.ram": Anonymous}},
		{name: "memfd", args: []string{"-M", "pc,memory-backend=m", "-m", "256", "-object", "memory-backend-memfd,id=m,size=256M,share=on"},
			expect: map[string]Backing{"m": Memfd}},
		{name: "private file on tmpfs", args: []string{"-M", "pc,memory-backend=m", "-m", "128", "-object", "memory-backend-file,id=m,size=128M,share=off,mem-path=" + shm + "/a"},
			expect: map[string]Backing{"m": PrivateFile}},
		{name: "shared file on tmpfs", args: []string{"-M", "pc,memory-backend=m", "-m", "128", "-object", "memory-backend-file,id=m,size=128M,share=on,mem-path=" + shm + "/b"},
			expect: map[string]Backing{"m": SharedFile}},
		{name: "private file on disk", args: []string{"-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-file,id=m,size=64M,share=off,mem-path=" + dir + "/c"},
			expect: map[string]Backing{"m": PrivateFile},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				m := b["m"]
				if ok, why := m.CanWriteProtect(); ok && m.FileType != "tmpfs" || !ok && why == "" {
					t.Errorf("on %s: write protection %v %q", m.FileType, ok, why)
				}
			}},
		{name: "prealloc", args: []string{"-M", "pc,memory-backend=m", "-m", "64", "-object", "memory-backend-ram,id=m,size=64M,prealloc=on"},
			expect: map[string]Backing{"m": Anonymous},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				if m := b["m"]; m.VMAs[0].RSSBytes < 64<<20 {
					t.Errorf("preallocated, yet %d bytes present", m.VMAs[0].RSSBytes)
				}
			}},
		{name: "split at 4 GiB", args: []string{"-M", "q35", "-m", "5120"}, expect: map[string]Backing{"pc.ram": Anonymous},
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				i := slices.IndexFunc(b["pc.ram"].Ranges, func(r GPARange) bool { return r.GPA == 4<<30 })
				if i < 0 || b["pc.ram"].Ranges[i].Offset == 0 {
					t.Errorf("no range above 4 GiB: %+v", b["pc.ram"].Ranges)
				}
			}},
		{name: "DIMM", args: []string{"-M", "pc", "-m", "128,slots=2,maxmem=2G", "-object", "memory-backend-ram,id=d1,size=128M", "-device", "pc-dimm,id=dimm1,memdev=d1"},
			expect: map[string]Backing{"pc.ram": Anonymous, "d1": Anonymous}},
		{name: "two NUMA nodes", args: []string{"-M", "q35", "-m", "256", "-smp", "2", "-object", "memory-backend-ram,id=n0,size=128M", "-object", "memory-backend-ram,id=n1,size=128M",
			"-numa", "node,memdev=n0", "-numa", "node,memdev=n1"}, expect: map[string]Backing{"n0": Anonymous, "n1": Anonymous}},
		{name: "ivshmem", args: []string{"-M", "q35", "-m", "128", "-object", "memory-backend-file,id=iv,size=1M,share=on,mem-path=" + shm + "/iv", "-device", "ivshmem-plain,memdev=iv"},
			refuse: []string{"migration-blocker"}, // a peer; a master may be saved
			check: func(t *testing.T, tgt *Target, b map[string]RAMBlock) {
				for name, blk := range b {
					if strings.HasSuffix(name, "/iv") && (blk.Backing != SharedFile || blk.FileType != "tmpfs" || !blk.Main) {
						t.Errorf("ivshmem: %+v", blk)
					}
				}
			}},
	}
	if _, err := os.Stat("/usr/share/OVMF/OVMF_CODE_4M.fd"); err == nil {
		cases = append(cases, layoutCase{name: "pflash", args: []string{"-M", "q35", "-m", "128",
			"-drive", "if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
			"-drive", "if=pflash,format=raw,unit=1,file=" + copied(t, dir, "/usr/share/OVMF/OVMF_VARS_4M.fd")},
			expect: map[string]Backing{"pc.ram": Anonymous, "system.flash0": Anonymous, "system.flash1": Anonymous}})
	}
	return cases
}

func TestLayout(t *testing.T) {
	for _, b := range builds(t) {
		for _, c := range layoutCases(t) {
			t.Run(b.name+"/"+c.name, func(t *testing.T) {
				tgt := openQEMU(t, b, append([]string{"-S"}, c.args...)...)
				start := time.Now()
				blocks, err := tgt.Layout(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				full := time.Since(start)
				by := make(map[string]RAMBlock)
				hows := make(map[string]int)
				for _, blk := range blocks {
					by[blk.Name] = blk
					hows[blk.How]++
				}
				for name, backing := range c.expect {
					if by[name].Backing != backing || by[name].Main == strings.HasPrefix(name, "system.") {
						t.Errorf("%s: %+v", name, by[name])
					}
				}
				if c.check != nil {
					c.check(t, tgt, by)
				}
				checkLayout(t, tgt, blocks)
				start = time.Now()
				again, err := ResolveLayout(t.Context(), tgt.Process, tgt.QMP, blocks)
				if err != nil {
					t.Fatal(err)
				}
				t.Logf("%d blocks %v: %v, with hints %v", len(blocks), hows, full, time.Since(start))
				if got, want := fmt.Sprintf("%+v", withoutHow(again)), fmt.Sprintf("%+v", withoutHow(blocks)); got != want {
					t.Errorf("with hints %s, without %s", got, want)
				}
				if r, err := tgt.Refusals(t.Context()); err != nil || !slices.Equal(codes(r), c.refuse) {
					t.Errorf("refusals %+v, %v", r, err)
				}
				m, err := tgt.Describe(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if len(m.Changes)+len(m.Refusals) != 0 {
					t.Errorf("an untouched machine differs: %+v %+v", m.Changes, m.Refusals)
				}
			})
		}
	}
}

// TestLayoutMethods takes one method after the other away and wants the same
// answer or a refusal, never another answer.
func TestLayoutMethods(t *testing.T) {
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "64", "-device", "virtio-net-pci", "-device", "virtio-net-pci")
			want, err := tgt.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			text, err := tgt.QMP.HMP(t.Context(), "info ramblock")
			if err != nil {
				t.Fatal(err)
			}
			lines, err := parseRAMBlocks(text)
			if err != nil {
				t.Fatal(err)
			}
			vmas, err := tgt.Process.ReadSmaps()
			if err != nil {
				t.Fatal(err)
			}
			for i := range lines {
				lines[i].hva = 0
			}
			check := func(t *testing.T, r *resolver, all bool) {
				t.Helper()
				for _, w := range want {
					got, ok := r.host[w.Name]
					if ok && got != w.HVA && r.how[w.Name] != HowContent {
						t.Errorf("%s by %s: %#x, want %#x", w.Name, r.how[w.Name], got, w.HVA)
					}
					if !ok && all {
						t.Errorf("%s not found", w.Name)
					}
				}
			}
			fresh := func() *resolver {
				return &resolver{p: tgt.Process, q: tgt.QMP, lines: lines, vmas: vmas, host: map[string]uint64{}, how: map[string]string{}}
			}
			r := fresh()
			if err := r.claimDirect(); err != nil {
				t.Fatal(err)
			}
			check(t, r, true)
			r = fresh()
			if _, err := r.claimMapped(t.Context()); err != nil {
				t.Fatal(err)
			}
			if r.how["pc.ram"] != HowGPA {
				t.Errorf("pc.ram by %q", r.how["pc.ram"])
			}
			check(t, r, false)
			// The NICs' ROMs are three of a size (with the board's); two hold the
			// same bytes, the third does not, so that without QEMU's records they
			// cannot be told apart.
			if err := r.claimBySize(); !errors.Is(err, errAmbiguous) {
				t.Errorf("ambiguous blocks: %v", err)
			}
			check(t, r, false)
		})
	}
}

func TestOpenIdentifies(t *testing.T) {
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "64", "-smp", "3", "-name", "guest=alpha,debug-threads=on")
			if tgt.Name != "alpha" || !strings.HasPrefix(tgt.Machine, "pc-q35-") || tgt.Accel != "tcg" || len(tgt.VCPUs) != 3 {
				t.Errorf("identity %+v", tgt)
			}
			tids, err := tgt.Process.Threads()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range tgt.VCPUs {
				if !slices.Contains(tids, c.TID) {
					t.Errorf("vCPU %d on thread %d, which is not QEMU's", c.Index, c.TID)
				}
			}
			p, err := PredictPause(t.Context(), tgt)
			if err != nil || p.UsedBytes == 0 || p.UsedBytes > p.TotalBytes || p.Pause <= 0 {
				t.Errorf("prediction %+v, %v", p, err)
			}
			other := startQEMU(t, b, "-S", "-M", "pc", "-m", "64")
			if _, err := Open(t.Context(), other.Process.Pid, Options{QMP: tgt.Endpoint.Address}); err == nil {
				t.Error("another VM's monitor was taken")
			}
		})
	}
}

func TestOpenWithAnotherVMsMonitor(t *testing.T) {
	b := builds(t)[0]
	dir := t.TempDir()
	extra := filepath.Join(dir, "second")
	first := startQEMU(t, b, "-S", "-M", "pc", "-m", "64", "-qmp", "unix:"+extra+",server=on,wait=off")
	second := startQEMU(t, b, "-S", "-M", "pc", "-m", "64")
	tgt, err := Open(t.Context(), first.Process.Pid, Options{QMP: extra})
	if err != nil {
		t.Fatal(err)
	}
	tgt.Close()
	if _, err := Open(t.Context(), second.Process.Pid, Options{QMP: extra}); !problem.Is(err, problem.Refused) {
		t.Errorf("got %v, want refused", err)
	}
	if tgt, err = Open(t.Context(), first.Process.Pid, Options{QMP: extra}); err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	// But a process that is on its way out has lost its threads, and is no stranger.
	p, err := OpenProcess(second.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	own := tgt.Process
	tgt.Process = p
	_ = second.Process.Kill()
	if _, err := tgt.ReadVCPUs(t.Context()); !problem.Is(err, problem.NotFound) {
		t.Errorf("got %v, want not found", err)
	}
	tgt.Process = own
}

func TestQEMUWithoutMonitor(t *testing.T) {
	b := builds(t)[0]
	cmd := exec.Command(b.binary, "-S", "-display", "none", "-M", "pc", "-m", "64", "-serial", "none", "-monitor", "none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	// Until exec has happened the child is this test binary.
	waitFor(t, func() bool { p, err := OpenProcess(cmd.Process.Pid); closeIf(p, err); return err == nil })
	if _, err := Open(t.Context(), cmd.Process.Pid, Options{}); err == nil || problem.Is(err, problem.Failed) {
		t.Errorf("got %v", err)
	}
}

func closeIf(p *Process, err error) {
	if err == nil {
		p.Close()
	}
}

// waitFor polls a condition that nothing announces.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("timed out")
		}
	}
}

func TestPauseKeepsAPausedMachinePaused(t *testing.T) {
	tgt := openQEMU(t, builds(t)[0], "-M", "pc", "-m", "64")
	was, err := tgt.Pause(t.Context())
	if err != nil || !was {
		t.Fatalf("pause of a running machine: %v %v", was, err)
	}
	if was, err = tgt.Pause(t.Context()); err != nil || was {
		t.Fatalf("pause of a paused machine: %v %v", was, err)
	}
	if r, err := tgt.Refusals(t.Context()); err != nil || len(r) != 0 {
		t.Errorf("a paused machine is refused: %+v %v", r, err)
	}
	if err := tgt.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := tgt.Status(t.Context()); err != nil || !s.Running {
		t.Errorf("after resume %+v %v", s, err)
	}
}

func TestTargetGoneIsNotFound(t *testing.T) {
	cmd := startQEMU(t, builds(t)[0], "-S", "-M", "pc", "-m", "64")
	tgt, err := Open(t.Context(), cmd.Process.Pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	_ = cmd.Process.Kill()
	<-tgt.Process.Done()
	for name, call := range map[string]func() error{
		"layout":   func() error { _, err := tgt.Layout(t.Context()); return err },
		"refusals": func() error { _, err := tgt.Refusals(t.Context()); return err },
		"describe": func() error { _, err := tgt.Describe(t.Context()); return err },
		"open":     func() error { _, err := Open(t.Context(), cmd.Process.Pid, Options{}); return err },
	} {
		if err := call(); !problem.Is(err, problem.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

var _ Monitor = (*qmp.Client)(nil)

func codes(list []Refusal) []string {
	var out []string
	for _, r := range list {
		out = append(out, r.Code)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func TestLayoutUnderKVM(t *testing.T) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no KVM here: %v", err)
	}
	f.Close()
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-accel", "kvm", "-M", "pc", "-m", "5120")
			if tgt.Accel != "kvm" {
				t.Errorf("accelerator %q", tgt.Accel)
			}
			blocks, err := tgt.Layout(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			checkLayout(t, tgt, blocks)
			if r, err := tgt.Refusals(t.Context()); err != nil || len(r) != 0 {
				t.Errorf("refusals %+v %v", r, err)
			}
			m, err := tgt.Describe(t.Context())
			if err != nil || len(m.Changes)+len(m.Refusals) != 0 {
				t.Errorf("%+v %+v %v", m.Changes, m.Refusals, err)
			}
		})
	}
}
