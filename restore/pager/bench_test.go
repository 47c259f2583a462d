package pager

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/loopholelabs/userfaultfd-go/pkg/mapper"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/procstat"
)

// The comparison is asked for by CKAGENT_BENCH=1: it takes seconds of both cores.
//
//	CKAGENT_BENCH=1 go test -run TestCompare -v ./restore/pager

// writeFullImage writes a checkpoint without zero pages and the same content as one
// raw file.
func writeFullImage(tb testing.TB, pages uint64) (dir, raw string) {
	dir = tb.TempDir()
	w, err := image.NewWriter(dir, []image.Block{{Name: "ram", UsedBytes: pages * PageBytes, TotalBytes: pages * PageBytes,
		PageBytes: PageBytes, GPA: -1, Backing: "anonymous", Main: true}}, image.WriterOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	raw = filepath.Join(tb.TempDir(), "raw")
	f, err := os.Create(raw)
	if err != nil {
		tb.Fatal(err)
	}
	defer f.Close()
	rnd, buf := rand.NewChaCha8([32]byte{1}), make([]byte, 1<<20)
	for at := uint64(0); at < pages; at += 256 {
		if _, err := rnd.Read(buf); err != nil {
			tb.Fatal(err)
		}
		if err := w.WritePages(0, at, buf); err != nil {
			tb.Fatal(err)
		}
		if _, err := f.Write(buf); err != nil {
			tb.Fatal(err)
		}
	}
	if err := w.WriteDeviceState(strings.NewReader("x")); err != nil {
		tb.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		tb.Fatal(err)
	}
	m := testManifest(s)
	m.Hot = nil
	b, err := image.EncodeManifest(m)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, image.ManifestName), b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return dir, raw
}

// touchMain is the reader of the comparison: it touches every n-th page in random
// order, one at a time, and prints the times. peer serves itself by mapper.Handle
// from the raw file, the same way a program built on it would.
type touchSpec struct {
	Pages, Touches uint64
	Sequential     bool
	Peer           string // raw file
}

type touchReport struct{ P50NS, P99NS, TotalNS int64 }

var touchSink byte // keeps the reads

const verbTouch = "__touch"

func touchMain(arg string) error {
	deepen()
	var spec touchSpec
	if err := json.Unmarshal([]byte(arg), &spec); err != nil {
		return err
	}
	runtime.GOMAXPROCS(4)
	mem, fd, start, err := mapper.Register(int(spec.Pages * PageBytes))
	if err != nil {
		return err
	}
	if spec.Peer != "" {
		f, err := os.Open(spec.Peer)
		if err != nil {
			return err
		}
		defer f.Close()
		go func() {
			if err := mapper.Handle(fd, start, f); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}()
	}
	enc := json.NewEncoder(os.Stdout)
	if err := enc.Encode(targetHello{FD: int(fd), HVA: []uint64{uint64(start)}}); err != nil {
		return err
	}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		order := rand.New(rand.NewPCG(1, 2)).Perm(int(spec.Pages))
		if spec.Sequential {
			slices.Sort(order)
		}
		times := make([]int64, 0, spec.Touches)
		begin := time.Now()
		for _, p := range order[:spec.Touches] {
			t0 := time.Now()
			touchSink += mem[uint64(p)*PageBytes]
			times = append(times, int64(time.Since(t0)))
		}
		total := int64(time.Since(begin))
		slices.Sort(times)
		if err := enc.Encode(touchReport{times[len(times)/2], times[len(times)*99/100], total}); err != nil {
			return err
		}
	}
	return nil
}

func startTouch(tb testing.TB, spec touchSpec) *target {
	b, _ := json.Marshal(spec)
	cmd := exec.Command(os.Args[0], verbTouch, string(b))
	// mapper.Handle ends on EINTR, which a preempting signal would cause.
	cmd.Env = append(os.Environ(), "GODEBUG=asyncpreemptoff=1", "GOGC=off")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	t := &target{tb: tb, cmd: cmd}
	var err error
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
	tb.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	t.recv(&t.hello)
	if stat, err := procstat.Read(cmd.Process.Pid); err == nil {
		t.start = stat.StartTicks
	} else {
		tb.Fatal(err)
	}
	return t
}

func (t *target) touch(tb testing.TB) (r touchReport) {
	tb.Helper()
	if _, err := fmt.Fprintln(t.in, "go"); err != nil {
		tb.Fatal(err)
	}
	t.recv(&r)
	return r
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

func TestCompare(t *testing.T) {
	if os.Getenv("CKAGENT_BENCH") == "" {
		t.Skip("a measurement: set CKAGENT_BENCH=1")
	}
	const pages, touches, rounds = 65536, 8000, 9
	dir, raw := writeFullImage(t, pages)
	loop := filepath.Join(t.TempDir(), "drainloop")
	if out, err := exec.Command("cc", "-O2", "-o", loop, "testdata/drainloop.c").CombinedOutput(); err != nil {
		t.Fatalf("cc: %v: %s", err, out)
	}
	figures := map[string][]float64{}
	add := func(name string, v float64) { figures[name] = append(figures[name], v) }
	blocks := []testBlock{{Pages: pages}}
	for range rounds {
		for _, seq := range []bool{false, true} {
			name := map[bool]string{false: "random", true: "sequential"}[seq]
			peer := startTouch(t, touchSpec{pages, touches, seq, raw})
			r := peer.touch(t)
			add(name+" peer p50 ns", float64(r.P50NS))
			add(name+" peer p99 ns", float64(r.P99NS))
			add(name+" peer total/touch ns", float64(r.TotalNS)/touches)
			_ = peer.cmd.Process.Kill()
			_ = peer.cmd.Wait()

			tg := startTouch(t, touchSpec{pages, touches, seq, ""})
			cfg := tg.config(t, dir, blocks)
			cfg.NoDrain = true
			p, err := Start(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			r = tg.touch(t)
			st := p.Stats()
			add("cold start to armed us", float64(st.ArmedNS)/1e3)
			add(name+" ours p50 ns", float64(r.P50NS))
			add(name+" ours p99 ns", float64(r.P99NS))
			add(name+" ours total/touch ns", float64(r.TotalNS)/touches)
			add(name+" ours service p50 ns", float64(st.FaultP50NS))
			add(name+" ours service p99 ns", float64(st.FaultP99NS))
			add(name+" ours faults", float64(st.Faults))
			tg.endPager(p)
		}
		for _, drainers := range []int{1, 2} {
			tg := startTouch(t, touchSpec{pages, 0, false, ""})
			cfg := tg.config(t, dir, blocks)
			cfg.Drainers, cfg.CollapseBudget = drainers, -1
			warm, err := Prestart(context.Background(), cfg.Self, cfg.RunDir, ImageSpec(dir))
			if err != nil {
				t.Fatal(err)
			}
			<-time.After(60 * time.Millisecond) // what QEMU takes to come up
			p, err := warm.Start(context.Background(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			mustWait(t, p)
			st := p.Stats()
			add(fmt.Sprintf("drain %d threads MB/s", drainers), float64(st.DrainedBytes)/float64(st.DrainedNS-st.ArmedNS)*1e3)
			add("warm start to armed us", float64(st.ArmedNS)/1e3)
			add("worker RSS MiB", float64(st.RSSBytes)/(1<<20))
			tg.endPager(p)
		}
		for _, chunk := range []string{"262144", "524288", "1048576"} {
			out, err := exec.Command(loop, raw, chunk).Output()
			var bytes, ns float64
			if _, serr := fmt.Sscan(string(out), &bytes, &ns); err != nil || serr != nil {
				t.Fatal(err, serr)
			}
			add("drain C loop "+chunk+" MB/s", bytes/ns*1e3)
		}
	}
	var names []string
	for n := range figures {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		t.Logf("%-36s %10.0f", n, median(figures[n]))
	}
}
