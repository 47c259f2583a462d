package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/tools/bench/report"
)

// missingFaults compares who brings pages in: the pager from a checkpoint,
// mapper.Handle from a raw file of the same content, and the C loop, which only
// copies one page it already has.
func (b *bench) missingFaults(ctx context.Context) error {
	pages, touches := 65536, 8000
	if b.Quick {
		pages, touches = 8192, 2000
	}
	dir, err := os.MkdirTemp(b.dir, "missing-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	images, raw := filepath.Join(dir, "image"), filepath.Join(dir, "raw")
	if err := writeImage(ctx, images, raw, pages); err != nil {
		return err
	}
	var f report.Figures
	for range b.rounds(67, 5) {
		for _, order := range []string{"random", "sequential"} {
			seq := order == "sequential"
			peer, err := touchPeer(ctx, touchSpec{pages, touches, seq, raw})
			if err != nil {
				return err
			}
			f.Add(order+" peer p50", peer.P50NS)
			f.Add(order+" peer p99", peer.P99NS)
			f.Add(order+" peer total", peer.TotalNS)
			ours, st, err := b.touchPager(ctx, touchSpec{pages, touches, seq, ""}, images)
			if err != nil {
				return err
			}
			f.Add(order+" ours p50", ours.P50NS)
			f.Add(order+" ours p99", ours.P99NS)
			f.Add(order+" ours total", ours.TotalNS)
			f.Add(order+" service p50", float64(st.FaultP50NS))
			f.Add(order+" service p99", float64(st.FaultP99NS))
			args := []string{"-k", "missing", "-n", fmt.Sprint(touches)}
			if !seq {
				args = append(args, "-R")
			}
			c, err := b.limit(ctx, args...)
			if err != nil {
				return err
			}
			f.Add(order+" limit p50", c["median_ns"])
			f.Add(order+" limit p99", c["p99_ns"])
		}
		speed, err := b.drainSpeed(ctx, pages, images)
		if err != nil {
			return err
		}
		f.Add("drain", speed)
		for _, chunk := range []string{"262144", "524288", "1048576"} {
			c, err := b.limit(ctx, "-k", "drain", "-f", raw, "-c", chunk)
			if err != nil {
				return err
			}
			f.Add("limit drain", c["bytes"]/c["total_ns"]*1e9)
		}
		// The peer has no drain: what it can do is serve all pages in order.
		all, err := touchPeer(ctx, touchSpec{pages, pages, true, raw})
		if err != nil {
			return err
		}
		f.Add("peer drain", float64(pages)*pageBytes/all.TotalNS*1e9)
	}
	group := fmt.Sprintf("Missing faults: %d MiB of local data, as the reader sees them", pages*pageBytes>>20)
	goal := report.Goal{Text: "≤ 12 µs median", Value: 12e3}
	for _, order := range []string{"random", "sequential"} {
		for _, q := range []string{"p50", "p99"} {
			ours, name := f.Get(order+" ours "+q), map[string]string{"p50": "median", "p99": "99th percentile"}[q]
			for _, p := range []struct{ id, name string }{{"peer", "mapper.Handle"}, {"limit", "C loop"}} {
				r := report.Row{ID: "missing/" + order + "/" + q + "/" + p.id, Group: group, What: order + " reads, " + name,
					Ours: ours.Median(), Peer: f.Get(order + " " + p.id + " " + q).Median(), PeerName: p.name, N: len(ours)}
				if q == "p50" && p.id == "peer" && order == "random" {
					r.Goal = goal
				}
				b.row(r)
			}
			service := f.Get(order + " service " + q)
			b.row(report.Row{ID: "missing/" + order + "/service-" + q, Group: group, What: order + " reads, served in (server's " + name + ")",
				Ours: service.Median(), Peer: math.NaN(), N: len(service)})
		}
		per := f.Get(order + " ours total")
		b.row(report.Row{ID: "missing/" + order + "/total", Group: group, What: fmt.Sprintf("%d %s reads, all of them", touches, order),
			Ours: per.Median(), Peer: f.Get(order + " peer total").Median(), PeerName: "mapper.Handle", N: len(per)})
	}
	n := len(f.Get("drain"))
	b.row(report.Row{ID: "missing/drain/limit", Group: group, What: "drain", Unit: report.PerSecond, Ours: f.Get("drain").Median(),
		Peer: f.Get("limit drain").Median(), PeerName: "C loop, one thread", N: n, Goal: report.Goal{Text: "≥ 70 % of the C loop", Ratio: 0.7, AtLeast: true}})
	b.row(report.Row{ID: "missing/drain/peer", Group: group, What: "drain", Unit: report.PerSecond, Ours: f.Get("drain").Median(),
		Peer: f.Get("peer drain").Median(), PeerName: "mapper.Handle, read in order", N: n, Goal: report.Goal{}})
	return nil
}

// writeImage writes a checkpoint without zero pages and the same content as a file.
func writeImage(ctx context.Context, dir, raw string, pages int) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	n := uint64(pages) * pageBytes
	w, err := image.NewWriter(dir, []image.Block{{Name: "ram", UsedBytes: n, TotalBytes: n, PageBytes: pageBytes, GPA: -1,
		Backing: "anonymous", Main: true}}, image.WriterOptions{})
	if err != nil {
		return err
	}
	f, err := os.OpenFile(raw, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	rnd, buf := rand.NewChaCha8([32]byte{1}), make([]byte, 1<<20)
	for at := 0; at < pages; at += len(buf) / pageBytes {
		if _, err := rnd.Read(buf); err != nil {
			return err
		}
		if err := w.WritePages(0, uint64(at), buf); err != nil {
			return err
		}
		if _, err := f.Write(buf); err != nil {
			return err
		}
	}
	if err := w.WriteDeviceState(strings.NewReader("none")); err != nil {
		return err
	}
	s, err := w.Finish(ctx)
	if err != nil {
		return err
	}
	m := &image.Manifest{Format: image.FormatName, Version: image.FormatMajor, Minor: image.FormatMinor, ID: "20260102T030405678-0123abcd", VM: "bench",
		CreatedAt: time.Now().UTC(), Mode: "stop", Engine: "none"}
	s.Apply(m)
	m.QEMU.Version, m.QEMU.BinaryPath = "7.2.0", "/none"
	m.Machine.Type, m.Machine.Accel, m.Machine.Argv = "pc-i440fx-7.2", "tcg", []string{"none"}
	enc, err := image.EncodeManifest(m)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, image.ManifestName), enc, 0o600)
}

func touchPeer(ctx context.Context, spec touchSpec) (touchTimes, error) {
	c, _, err := startTouch(ctx, spec)
	if err != nil {
		return touchTimes{}, err
	}
	defer c.close()
	return c.touch()
}

// startPager starts the product's pager on a toucher's memory.
func (b *bench) startPager(ctx context.Context, c *child, h touchHello, pages int, dir string, noDrain bool) (*pager.Process, func(), error) {
	run, err := os.MkdirTemp(b.dir, "pager-")
	if err != nil {
		return nil, nil, err
	}
	ticks, err := startTicks(c.cmd.Process.Pid)
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(run))
	}
	p, err := pager.Start(ctx, pager.Config{Self: b.Binary, RunDir: run, ImageDir: dir, QEMUPID: c.cmd.Process.Pid, QEMUStart: ticks,
		RemoteFD: h.FD, Blocks: []pager.Block{{Name: "ram", HVA: h.Base, Bytes: uint64(pages) * pageBytes}}, NoDrain: noDrain, CollapseBudget: -1})
	if err != nil {
		return nil, nil, errors.Join(err, os.RemoveAll(run))
	}
	return p, func() {
		c.close()                              // the pager ends when what it serves does
		_ = p.Wait(context.WithoutCancel(ctx)) // says that it is gone
		_ = p.Detach()
		_ = os.RemoveAll(run)
	}, nil
}

func (b *bench) touchPager(ctx context.Context, spec touchSpec, dir string) (t touchTimes, st pager.Stats, err error) {
	c, hello, err := startTouch(ctx, spec)
	if err != nil {
		return t, st, err
	}
	p, end, err := b.startPager(ctx, c, hello, spec.Pages, dir, true)
	if err != nil {
		c.close()
		return t, st, err
	}
	defer end()
	t, err = c.touch()
	return t, p.Stats(), err
}

// drainSpeed is how fast the pager brings everything in when nobody asks.
func (b *bench) drainSpeed(ctx context.Context, pages int, dir string) (float64, error) {
	c, hello, err := startTouch(ctx, touchSpec{Pages: pages})
	if err != nil {
		return 0, err
	}
	p, end, err := b.startPager(ctx, c, hello, pages, dir, false)
	if err != nil {
		c.close()
		return 0, err
	}
	defer end()
	if err := p.Wait(ctx); err != nil {
		return 0, err
	}
	st := p.Stats()
	return float64(st.DrainedBytes) / float64(st.DrainedNS-st.ArmedNS) * 1e9, nil
}

// writeFaults compares what a first write costs who does it: with the product's
// fault server, as in a checkpoint, and with the C loop of the same system calls.
// A guest does something else between two writes: so does the writer here.
func (b *bench) writeFaults(ctx context.Context) error {
	pages := 16384
	if b.Quick {
		pages = 4096
	}
	var f report.Figures
	for range b.rounds(67, 5) {
		for _, gap := range []string{"0", "20000"} {
			c, err := b.limit(ctx, "-k", "write", "-R", "-n", fmt.Sprint(pages), "-g", gap)
			if err != nil {
				return err
			}
			f.Add(gap+" limit p50", c["median_ns"])
			f.Add(gap+" limit p99", c["p99_ns"])
			for _, around := range []int{1, 16} {
				w, st, err := b.writeOnce(ctx, pages, gap, around, faultserver.Synchronous)
				if err != nil {
					return err
				}
				key := fmt.Sprintf("%s around %d ", gap, around)
				f.Add(key+"p50", w["median_ns"])
				f.Add(key+"p99", w["p99_ns"])
				f.Add(key+"total", w["total_ns"])
				f.Add(key+"faults", float64(st.Faults))
				f.Add(key+"service p50", float64(st.FaultP50NS))
				f.Add(key+"service p99", float64(st.FaultP99NS))
			}
			w, st, err := b.writeOnce(ctx, pages, gap, 1, faultserver.Kernel)
			if err != nil {
				return err
			}
			f.Add(gap+" kernel p50", w["median_ns"])
			f.Add(gap+" kernel p99", w["p99_ns"])
			f.Add(gap+" kernel pages", float64(st.FaultPages))
		}
	}
	group := fmt.Sprintf("First writes while a checkpoint runs: %d pages in random order, as the writer sees them", pages)
	for _, gap := range []string{"0", "20000"} {
		text := map[string]string{"0": "back to back", "20000": "20 µs apart"}[gap]
		n := len(f.Get(gap + " kernel p50"))
		b.row(report.Row{ID: "write/" + gap + "/kernel/p50", Group: group, What: text + ", engine bpf, median", Ours: f.Get(gap + " kernel p50").Median(),
			Peer: f.Get(gap + " limit p50").Median(), PeerName: "C loop", N: n, Goal: report.Goal{Text: "≤ 2.5 µs", Value: 2.5e3}})
		b.row(report.Row{ID: "write/" + gap + "/kernel/p99", Group: group, What: text + ", engine bpf, 99th percentile", Ours: f.Get(gap + " kernel p99").Median(),
			Peer: f.Get(gap + " limit p99").Median(), PeerName: "C loop", N: n})
		b.row(report.Row{ID: "write/" + gap + "/kernel/pages", Group: group, What: text + ", engine bpf, pages copied", Unit: report.Count, Ours: f.Get(gap + " kernel pages").Median(),
			Peer: float64(pages), PeerName: "written", N: n})
		for _, around := range []int{1, 16} {
			key := fmt.Sprintf("%s around %d ", gap, around)
			name := fmt.Sprintf("%s, up to %d pages a fault", text, around)
			n = len(f.Get(key + "p50"))
			goal := report.Goal{}
			if around == 1 {
				goal = report.Goal{Text: "≤ 10 µs", Value: 10e3}
			}
			id := fmt.Sprintf("write/%s/%d/", gap, around)
			b.row(report.Row{ID: id + "p50", Group: group, What: name + ", median", Ours: f.Get(key + "p50").Median(), Peer: f.Get(gap + " limit p50").Median(),
				PeerName: "C loop", N: n, Goal: goal})
			b.row(report.Row{ID: id + "p99", Group: group, What: name + ", 99th percentile", Ours: f.Get(key + "p99").Median(), Peer: f.Get(gap + " limit p99").Median(),
				PeerName: "C loop", N: n})
			b.row(report.Row{ID: id + "service", Group: group, What: name + ", served in (server's median)", Ours: f.Get(key + "service p50").Median(), Peer: math.NaN(), N: n})
			b.row(report.Row{ID: id + "faults", Group: group, What: name + ", faults taken", Unit: report.Count, Ours: f.Get(key + "faults").Median(),
				Peer: float64(pages), PeerName: "C loop", N: n})
		}
	}
	return nil
}

// writeOnce lets a process write its pages while the fault server holds them; what
// is captured is read and dropped, as fast as a store that costs nothing.
func (b *bench) writeOnce(ctx context.Context, pages int, gap string, around int, engine faultserver.Engine) (w figures, st faultserver.Stats, err error) {
	c, err := startChild(ctx, nil, b.cwp, "-T", "-M", "-R", "-k", "write", "-n", fmt.Sprint(pages), "-g", gap)
	if err != nil {
		return nil, st, err
	}
	defer c.close()
	line, err := c.line()
	if err != nil {
		return nil, st, err
	}
	var base uint64
	if _, err := fmt.Sscanf(line, "0x%x", &base); err != nil {
		return nil, st, fmt.Errorf("cwp: %q: %w", line, err)
	}
	control, page, err := guardian.CreateControl()
	if err != nil {
		return nil, st, err
	}
	defer func() { err = errors.Join(err, control.Close(), page.Close()) }()
	srv, err := faultserver.New(faultserver.Start{Self: b.Binary, Args: []string{capture.FaultServerVerb}, Control: page,
		FaultRingPages: 16384, ScanRingPages: 16384,
		Config: faultserver.Config{QEMUPID: c.cmd.Process.Pid, FaultThreads: 1, ScanThreads: max(1, min(4, runtime.NumCPU()/2)),
			MaxStall: time.Second, Engine: engine, RingBytes: 128 << 20, FaultAround: around, HugeAround: true, Collapse: time.Millisecond,
			Blocks: []source.Block{{HVA: base, Pages: uint64(pages), Kind: source.Anonymous}}}})
	if err != nil {
		return nil, st, err
	}
	defer func() { err = errors.Join(err, srv.Close()) }()
	if err := errors.Join(srv.Ready(ctx), srv.Prearm(ctx)); err != nil {
		return nil, st, err
	}
	if err := srv.Freeze(ctx); err != nil {
		return nil, st, err
	}
	stop, wait := discard(ctx, srv.Arena())
	defer func() { err = errors.Join(err, wait()) }()
	defer stop()
	if err := c.start(); err != nil {
		return nil, st, err
	}
	if line, err = c.line(); err != nil {
		return nil, st, err
	}
	if err := srv.Abort(ctx); err != nil {
		return nil, st, err
	}
	w, err = keyValues(line)
	return w, srv.Stats(), err
}

// discard empties the rings until stop.
func discard(ctx context.Context, a *arena.Arena) (stop func(), wait func() error) {
	ctx, stop = context.WithCancel(ctx)
	var wg sync.WaitGroup
	errs := make([]error, a.Rings())
	for i := range a.Rings() {
		wg.Go(func() {
			r := a.Ring(i)
			for ctx.Err() == nil {
				_, ok, done, err := r.Next(10 * time.Millisecond)
				if err != nil || done {
					errs[i] = err
					return
				}
				if ok {
					r.Done()
				}
			}
		})
	}
	return stop, func() error { wg.Wait(); return errors.Join(errs...) }
}
