package pager

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

const verbTarget = "__target"

// TestMain lets the test binary be all the processes a pager has to do with.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case VerbWorker:
			err = Main(context.Background(), os.Args[2:], map[string]Opener{"slow": openSlow})
		case VerbSupervisor:
			err = SuperviseMain(context.Background(), os.Args[2:], nil)
		case verbTarget:
			err = targetMain(os.Args[2])
		case verbTouch:
			err = touchMain(os.Args[2])
		default:
			goleak.VerifyTestMain(m)
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(problem.ExitCode(err))
	}
	goleak.VerifyTestMain(m)
}

// testBlock is a block of the target and of the checkpoint it is restored from.
type testBlock struct {
	Pages  uint64
	Memfd  bool // shared memory instead of anonymous
	Eager  bool
	Dirty  bool // has pages before the pager starts: must be refused
	HasCow bool // the target writes to its pages too
}

// pageOf is the content of a page: many are zero, in long rows, in short ones and alone.
func pageOf(block int, page uint64, dst []byte) {
	clear(dst)
	if page/64%4 == 1 || page%7 == 3 || page/2048%4 == 2 {
		return
	}
	x := uint64(block+1)<<48 ^ page*0x9e3779b97f4a7c15
	for i := 0; i < len(dst); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(dst[i:], x|1)
	}
}

// writeTestImage writes a checkpoint of the blocks.
func writeTestImage(tb testing.TB, blocks []testBlock, compress string) string {
	tb.Helper()
	dir := tb.TempDir()
	var ib []image.Block
	for i, b := range blocks {
		ib = append(ib, image.Block{Name: fmt.Sprintf("ram%d", i), UsedBytes: b.Pages * PageBytes, TotalBytes: b.Pages * PageBytes,
			PageBytes: PageBytes, GPA: -1, Backing: "anonymous", Main: true})
	}
	w, err := image.NewWriter(dir, ib, image.WriterOptions{Compress: compress})
	if err != nil {
		tb.Fatal(err)
	}
	buf := make([]byte, 64*PageBytes)
	for i, b := range blocks {
		for at := uint64(0); at < b.Pages; at += 64 {
			n := min(64, b.Pages-at)
			for k := range n {
				pageOf(i, at+k, buf[k*PageBytes:(k+1)*PageBytes])
			}
			if err := w.WritePages(i, at, buf[:n*PageBytes]); err != nil {
				tb.Fatal(err)
			}
		}
	}
	if err := w.WriteDeviceState(strings.NewReader("device state")); err != nil {
		tb.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	m := testManifest(s)
	m.Hot = image.HotRuns{{Block: 0, First: 16, Pages: 16}}
	b, err := image.EncodeManifest(m)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, image.ManifestName), b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func testManifest(s image.Summary) *image.Manifest {
	m := &image.Manifest{Format: image.FormatName, Version: image.FormatMajor, Minor: image.FormatMinor,
		ID: "20260102T030405678-0123abcd", VM: "test", CreatedAt: time.Unix(1767323045, 0), Mode: "stop", Engine: "none",
		QEMU:    image.QEMU{Version: "7.2.0", BinaryPath: "/usr/bin/qemu-system-x86_64"},
		Machine: image.Machine{Type: "pc-i440fx-7.2", Accel: "tcg", Argv: []string{"qemu"}}}
	s.Apply(m)
	return m
}

// target is the process that is paged in.
type target struct {
	tb    testing.TB
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	hello targetHello
	start uint64
}

func startTarget(tb testing.TB, spec targetSpec) *target {
	tb.Helper()
	b, err := json.Marshal(spec)
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], verbTarget, string(b))
	// The threads must fault where the test wants it and nowhere else.
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOGC=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if !spec.Quiet {
		cmd.Stderr = os.Stderr
	}
	t := &target{tb: tb, cmd: cmd}
	if t.in, err = cmd.StdinPipe(); err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	t.out = bufio.NewReader(out)
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.recv(&t.hello)
	if stat, err := procstat.Read(cmd.Process.Pid); err == nil {
		t.start = stat.StartTicks
	} else {
		tb.Fatal(err)
	}
	return t
}

func (t *target) recv(v any) {
	t.tb.Helper()
	line, err := t.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, v)
	}
	if err != nil {
		t.tb.Fatalf("target: %v: %q", err, line)
	}
}

// ask sends a command and returns the report that answers it.
func (t *target) ask(command string) (r targetReport) {
	t.tb.Helper()
	if _, err := fmt.Fprintln(t.in, command); err != nil {
		t.tb.Fatal(err)
	}
	t.recv(&r)
	return r
}

func (t *target) config(tb testing.TB, imageDir string, blocks []testBlock) Config {
	dir := tb.TempDir()
	cfg := Config{Self: os.Args[0], RunDir: dir, ImageDir: imageDir, QEMUPID: t.cmd.Process.Pid, QEMUStart: t.start, RemoteFD: t.hello.FD}
	for i, b := range blocks {
		cfg.Blocks = append(cfg.Blocks, Block{Name: fmt.Sprintf("ram%d", i), ImageBlock: i, HVA: t.hello.HVA[i], Bytes: b.Pages * PageBytes, Eager: b.Eager})
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			if b, err := os.ReadFile(filepath.Join(dir, logFile)); err == nil {
				tb.Logf("%s:\n%s", logFile, b)
			}
		}
	})
	return cfg
}

// start starts a pager and makes sure that it is gone after the test.
func (t *target) serve(tb testing.TB, cfg Config) *Process {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	p, err := Start(ctx, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { t.endPager(p) })
	return p
}

// endPager ends whatever is left of a pager: with its target it ends itself.
func (t *target) endPager(p *Process) {
	_ = t.cmd.Process.Kill()
	_, _ = t.cmd.Process.Wait()
	select {
	case <-p.over:
	case <-time.After(5 * time.Second):
		t.tb.Errorf("pager outlives its target: %+v", p.Stats())
		for _, s := range []*seat{&p.ctl.worker, &p.ctl.supervisor} {
			kill(s.occupant())
		}
	}
	p.Close()
}

func mustWait(tb testing.TB, p *Process) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		tb.Fatalf("%v\n%+v", err, p.Stats())
	}
}

// checkLetGo makes sure that nothing of a pager is attached to the target.
func (t *target) checkLetGo(tb testing.TB) {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", t.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		for _, f := range []string{" um", " uw", " ui"} {
			if strings.HasPrefix(line, "VmFlags:") && strings.Contains(line+" ", f+" ") {
				tb.Fatalf("still registered: %s", line)
			}
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", t.cmd.Process.Pid))
	if err != nil {
		tb.Fatal(err)
	}
	for _, fd := range fds {
		link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", t.cmd.Process.Pid, fd.Name()))
		if strings.Contains(link, "userfaultfd") {
			tb.Fatalf("descriptor %s is still open inside", fd.Name())
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.cmd.Process.Pid))
	if err != nil || !bytes.Contains(status, []byte("TracerPid:\t0\n")) {
		tb.Fatalf("traced, or gone: %v", err)
	}
}

// waitFor polls a condition that other processes bring about.
func waitFor(tb testing.TB, what string, d time.Duration, ok func() bool) {
	tb.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(d)
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("%s: not within %v", what, d)
		}
	}
}

// slowSource delays every read: a store that is far away.
type slowSource struct {
	PageSource
	delay time.Duration
}

type slowParams struct {
	Dir   string        `json:"dir"`
	Delay time.Duration `json:"delay"`
}

func openSlow(ctx context.Context, params json.RawMessage) (PageSource, error) {
	var p slowParams
	if err := json.Unmarshal(params, &p); err != nil {
		return nil, err
	}
	s, err := OpenImageSource(ctx, p.Dir)
	if err != nil {
		return nil, err
	}
	return &slowSource{s, p.Delay}, nil
}

func (s *slowSource) ReadRun(ctx context.Context, c Class, block int, first uint64, dst []byte) (int, error) {
	t := time.NewTimer(time.Duration(rand.Int64N(int64(2 * s.delay))))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-t.C:
	}
	return s.PageSource.ReadRun(ctx, c, block, first, dst)
}
