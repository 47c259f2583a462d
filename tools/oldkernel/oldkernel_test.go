package oldkernel

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ckagent/ckagent/agent/doctor"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// deadline is far beyond what this takes on a quiet machine (a minute).
const deadline = 2 * time.Minute

// machine is a host with an old kernel and what is run on it.
type machine struct {
	*Host
	t     *testing.T
	ctx   context.Context
	table []string // lines of what was seen
}

func (m *machine) run(format string, args ...any) Reply {
	m.t.Helper()
	r, err := m.Run(m.ctx, fmt.Sprintf(format, args...))
	if err != nil {
		m.t.Fatalf("%v; console:\n%s", err, m.Console())
	}
	return r
}

// verb runs ckagent with --json, checks its exit code, and decodes what it said
// into out.
func (m *machine) verb(want int, out any, args string) {
	m.t.Helper()
	begin := time.Now()
	r := m.run("ckagent %s --json", args)
	for try := 0; r.Code != want && m.starved(r) && try < 5; try++ {
		m.t.Logf("ckagent %s: again, after exit %d: %s%s", args, r.Code, r.Out, r.Stderr)
		r = m.run("ckagent %s --json", args)
	}
	if r.Code != want {
		m.t.Fatalf("ckagent %s: exit %d, want %d\n%s\n%s", args, r.Code, want, r.Out, r.Stderr)
	}
	if err := json.Unmarshal([]byte(r.Out), out); err != nil {
		m.t.Fatalf("ckagent %s: %v\n%s", args, err, r.Out)
	}
	m.t.Logf("ckagent %s: %v", args, time.Since(begin).Round(10*time.Millisecond))
}

// starved tells whether a verb ended because nothing ran in time, as happens in an
// emulated machine on a busy host: it was told to try again (a QEMU that does not
// greet within a second), or its guardian heard nothing of it for half a second,
// ended it, and left a report.
func (m *machine) starved(r Reply) bool {
	if r.Code != 137 {
		var f struct{ Error struct{ Retryable bool } }
		_ = json.Unmarshal([]byte(r.Out), &f) // no error object: not retryable
		return f.Error.Retryable
	}
	// The guardian reports when it has put the VM right, after the agent's death.
	report := m.run("timeout 20 sh -c 'until ls /run/ckagent/*.report.json; do usleep 200000; done' >/dev/null 2>&1;" +
		" cat /run/ckagent/*.report.json && rm /run/ckagent/*.report.json")
	return strings.Contains(report.Out, "the agent gave no sign of life")
}

// await reads the guest's console from byte from on until ok holds.
func (m *machine) await(from int, ok func(vmtest.Report) bool) (vmtest.Report, int) {
	m.t.Helper()
	for {
		r := m.run("usleep 200000; cat /w/console")
		if len(r.Out) >= from {
			if rep := vmtest.ParseReport(r.Out[from:]); ok(rep) {
				return rep, len(r.Out)
			}
		}
		if m.run("kill -0 $(cat /w/pid)").Code != 0 {
			m.t.Fatalf("the VM is gone: %s\n%s", m.run("cat /w/log").Out, r.Out)
		}
	}
}

// untouched checks that nothing of ours is left in a QEMU process.
func (m *machine) untouched(pid string) {
	m.t.Helper()
	r := m.run("grep -E '^VmFlags:.* u[mwi]( |$)' /proc/%s/smaps; readlink /proc/%s/fd/* | grep userfaultfd; grep TracerPid: /proc/%s/status", pid, pid, pid)
	if strings.TrimSpace(r.Out) != "TracerPid:\t0" {
		m.t.Errorf("left in pid %s: %s", pid, r.Out)
	}
}

// TestLinux61 is Debian 12's own kernel: what it lacks is said, mode cow is
// refused, mode auto falls back, and a lazy restore works.
func TestLinux61(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a machine under emulation")
	}
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	begin := time.Now()
	h, err := Boot(ctx, Options{Binary: release(t)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	m := &machine{Host: h, t: t, ctx: ctx}
	kernel := strings.TrimSpace(m.run("uname -r").Out)
	if !strings.HasPrefix(kernel, "6.1.") {
		t.Fatalf("kernel %s, want Debian 12's 6.1", kernel)
	}
	t.Logf("Linux %s answers after %v", kernel, time.Since(begin).Round(10*time.Millisecond))
	m.doctor(kernel)
	m.startVM()
	m.checkpoints()
	m.restore()
	m.comparePage()
}

const (
	bpfless = "unsupported: bpf cow: load: not in this kernel: programs are not attached before Linux 6.6: not supported"
	kvmless = "the subject did not begin: open /dev/kvm: no such file or directory"
)

// doctor checks what is said about this kernel, word for word.
func (m *machine) doctor(kernel string) {
	var r doctor.Report
	m.verb(0, &r, "doctor")
	if r.Schema != doctor.Schema || r.Kernel != kernel {
		m.t.Errorf("schema %q, kernel %q", r.Schema, r.Kernel)
	}
	gaps := map[string]string{}
	for _, c := range r.Gaps() {
		if c.Group == "kernel" || c.Group == "bpf" || c.Group == "rights" || c.Group == "qemu" {
			gaps[c.Name] = c.Detail
		}
		if c.Detail == "" || c.Costs == "" || c.Mend == "" {
			m.t.Errorf("a gap without explanation: %+v", c)
		}
	}
	if d := cmp.Diff(map[string]string{
		"marks on absent pages": "this kernel lacks WP_UNPOPULATED",
		"asynchronous tracking": "this kernel lacks WP_ASYNC",
		"PAGEMAP_SCAN":          "not in this kernel",
		"tcx":                   "not in this kernel: tcx not supported (requires >= v6.6)",
		"signal dirty":          "not in this kernel: programs are not attached before Linux 6.6: not supported",
		"signal disk":           "not in this kernel: programs are not attached before Linux 6.6: not supported",
		"signal sock":           "not in this kernel: programs are not attached before Linux 6.6: not supported",
		"signal vcpu":           "not in this kernel: programs are not attached before Linux 6.6: not supported",
		"capture in the kernel, kvm, anonymous RAM": kvmless,
		"capture in the kernel, kvm, shared RAM":    kvmless,
		"capture in the kernel, tcg, anonymous RAM": bpfless,
		"capture in the kernel, tcg, shared RAM":    bpfless,
	}, gaps); d != "" {
		m.t.Errorf("gaps (-want +got):\n%s", d)
	}
	stopped := []string{"stop", "buffer"}
	const why = "this kernel has no marks on absent pages, no PAGEMAP_SCAN"
	if d := cmp.Diff([]doctor.Engine{
		{RAM: "anonymous", Engine: "none", Modes: stopped, Reason: why},
		{RAM: "memfd or tmpfs, shared", Engine: "none", Modes: stopped, Reason: why},
		{RAM: "tmpfs, private", Engine: "none", Modes: stopped, Reason: why},
		{RAM: "file on a disk", Engine: "none", Modes: stopped, Reason: "the kernel write-protects no file mappings of disk filesystems"},
		{RAM: "hugetlbfs, pages of 2 MiB", Engine: "none", Modes: stopped, Reason: why},
	}, r.Engines); d != "" {
		m.t.Errorf("engines (-want +got):\n%s", d)
	}
	m.noteGaps(&r)
	if c := r.Find("kernel", "missing faults"); c == nil || c.Status != doctor.OK {
		m.t.Errorf("lazy restores: %+v", c)
	}
}

func (m *machine) startVM() {
	m.run("mkdir /w; setsid qemu-system-x86_64 -name inner -nodefaults -no-user-config -display none -no-reboot" +
		" -machine pc,accel=tcg -m 48M -chardev file,id=s0,append=on,path=/w/console -serial chardev:s0" +
		" -qmp unix:/w/qmp,server=on,wait=off -kernel " + guestPath + ` -append "ws=16 rate=500 sweep=4000 report=500"` +
		" >/w/log 2>&1 & echo $! >/w/pid")
	m.await(0, func(r vmtest.Report) bool { return r.Sweeps >= 1 })
}

// taken is what matters here of a checkpoint.
type taken struct {
	ID, VM, Mode, Engine, Reason string
	QEMUPID                      int    `json:"qemu_pid"`
	Pages                        uint64 `json:"pages"`
	ZeroPages                    uint64 `json:"zero_pages"`
	PauseNS                      int64  `json:"pause_ns"`
}

type failure struct {
	Error struct{ Code, Message, Hint string }
}

const lacks = "this kernel's userfaultfd lacks WP_UNPOPULATED"

func (m *machine) checkpoints() {
	pid := strings.TrimSpace(m.run("cat /w/pid").Out)
	var explained struct {
		Protected bool `json:"can_protect"`
		Mode      string
		Reason    string
	}
	m.verb(0, &explained, "explain "+pid)
	if !explained.Protected || explained.Mode != "stop" || explained.Reason != lacks {
		m.t.Errorf("explain: %+v", explained)
	}

	var refused failure
	m.verb(3, &refused, "checkpoint --mode cow --store /w/store "+pid)
	if e := refused.Error; e.Code != "refused" || !strings.Contains(e.Message, lacks) || !strings.Contains(e.Hint, "mode buffer or stop") {
		m.t.Errorf("mode cow: %+v", e)
	} else {
		m.note("`checkpoint --mode cow`", "refused (3)", lacks+": "+e.Hint)
	}
	if r := m.run("ls /w/store/vms"); r.Code == 0 && r.Out != "" {
		m.t.Errorf("a refused checkpoint left %s", r.Out)
	}

	for _, c := range []struct{ flag, mode, reason string }{{"", "stop", lacks}, {"--mode stop ", "stop", ""}, {"--mode buffer ", "buffer", ""}} {
		var got taken
		m.verb(0, &got, "checkpoint "+c.flag+"--store /w/store "+pid)
		if got.Mode != c.mode || got.Engine != "none" || got.Reason != c.reason || got.VM != "inner" || fmt.Sprint(got.QEMUPID) != pid || got.PauseNS <= 0 {
			m.t.Errorf("checkpoint %s: %+v", c.flag, got)
		}
		if c.flag == "" {
			m.note("`checkpoint`", "works, in mode "+got.Mode, got.Reason)
		} else {
			m.note("`checkpoint "+strings.TrimSpace(c.flag)+"`", "works", "")
		}
		// 4096 pages of working set and little else: nothing is missing, and
		// what the guest never used is not stored.
		if used := got.Pages - got.ZeroPages; used < 4096 || used > 5000 {
			m.t.Errorf("checkpoint %s: %d of %d pages have content", c.flag, used, got.Pages)
		}
		m.untouched(pid)
		var verified struct {
			ID       string
			Verified bool
		}
		m.verb(0, &verified, "verify --store /w/store "+got.ID)
		if !verified.Verified || verified.ID != got.ID {
			m.t.Errorf("verify: %+v", verified)
		}
	}
	if r, _ := m.await(0, func(vmtest.Report) bool { return true }); r.Bad != 0 || len(r.SeqErrors) != 0 || len(r.Trouble) != 0 {
		m.t.Errorf("the guest noticed: %+v", r)
	}
}

// restore kills the VM and brings it back lazily; the drain is slowed down so
// that the guest needs pages before it brings them.
func (m *machine) restore() {
	m.run("kill -9 $(cat /w/pid)")
	from := len(m.run("cat /w/console").Out)
	var got struct {
		QEMUPID   int    `json:"qemu_pid"`
		LazyBytes uint64 `json:"lazy_bytes"`
		Running   int64  `json:"command_to_running_ns"`
		Drained   int64  `json:"drained_ns"`
		Faults    uint64 `json:"faults"`
		Lazy      bool
		VM        string
	}
	m.verb(0, &got, "restore --store /w/store --bandwidth 2M inner")
	if !got.Lazy || got.LazyBytes < 48<<20 || got.Faults == 0 || got.Running <= 0 || got.Drained <= got.Running {
		m.t.Errorf("restore: %+v", got)
	}
	m.note("`restore`, lazily", "works", "")
	m.t.Logf("restored: running after %v, drained after %v, %d faults", time.Duration(got.Running), time.Duration(got.Drained), got.Faults)
	m.run("echo %d >/w/pid", got.QEMUPID)
	first, _ := m.await(from, func(r vmtest.Report) bool { return r.Writes > 0 })
	last, _ := m.await(from, func(r vmtest.Report) bool { return r.Sweeps >= first.Sweeps+2 && r.Writes > first.Writes })
	if last.Bad != 0 || len(last.SeqErrors) != 0 || len(last.Trouble) != 0 || last.Ready {
		m.t.Errorf("the restored guest: %+v", last)
	}
	m.untouched(fmt.Sprint(got.QEMUPID))
}
