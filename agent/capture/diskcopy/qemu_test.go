package diskcopy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/store/storetest"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/disk"
	"github.com/ckagent/ckagent/tools/guest"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// bed is a machine with disks and no guest: the test writes in its place.
type bed struct {
	t     *testing.T
	dir   string
	store *store.Store
	vm    *vm.Target
	seed  int64
}

func newBed(t *testing.T, q guest.QEMU, args func(dir string) []string) *bed {
	t.Helper()
	b := &bed{t: t, dir: t.TempDir()}
	v := vmtest.Start(t, vmtest.Config{QEMU: q, Guest: vmtest.NoGuest, MemoryMiB: 64, Args: args(b.dir)})
	var err error
	if b.vm, err = vm.Open(t.Context(), v.PID(), vm.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.vm.Close() })
	if b.store, err = store.Open(filepath.Join(b.dir, "store")); err != nil {
		t.Fatal(err)
	}
	return b
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// write has the device write, as its guest would.
func (b *bed) write(device, what string, args ...any) {
	b.t.Helper()
	out, err := b.vm.QMP.HMP(b.t.Context(), fmt.Sprintf("qemu-io -d %s \"%s\"", device, fmt.Sprintf(what, args...)))
	// QEMU 10 says on its own output what was written, and here only what went wrong.
	if err != nil || out != "" && !strings.Contains(out, "wrote") {
		b.t.Fatalf("%s: %s %v", device, out, err)
	}
}

// sources are the machine's disks, all of which can be taken.
func (b *bed) sources() []vm.DiskSource {
	b.t.Helper()
	s, refused, err := b.vm.DiskSources(b.t.Context())
	if err != nil || len(refused) > 0 {
		b.t.Fatalf("refused: %+v %v", refused, err)
	}
	return s
}

// begun is a checkpoint whose instant is over and whose copies run.
type begun struct {
	*Set
	txn  *store.Txn
	refs []string // copies of the disks, made while the machine stood still
}

// begin takes the instant of all disks.
func (b *bed) begin(change func(*Config)) *begun {
	b.t.Helper()
	ctx := b.t.Context()
	txn, err := b.store.Begin(ctx, "vm")
	if err != nil {
		b.t.Fatal(err)
	}
	c := Config{QMP: b.vm.QMP, Sources: b.sources(), Store: b.store, Txn: txn, VM: "vm"}
	if change != nil {
		change(&c)
	}
	s, err := Plan(ctx, c)
	if err == nil {
		err = s.Prepare(ctx)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.vm.FlushDisks(ctx); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.vm.Pause(ctx); err != nil {
		b.t.Fatal(err)
	}
	start := time.Now()
	calls, err := b.vm.QMP.Send(s.Requests()...)
	if err == nil {
		err = s.Confirm(ctx, calls)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Logf("fixing the instant of %d disks took %v", len(c.Sources), time.Since(start).Round(time.Microsecond))
	w := &begun{Set: s, txn: txn}
	for i, src := range c.Sources {
		ref := filepath.Join(b.dir, fmt.Sprintf("ref-%s-%d.raw", txn.ID(), i))
		from := src.Path
		if !strings.Contains(from, ":") && src.Format == "qcow2" && src.File == "" {
			run(b.t, "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", from, ref)
		} else {
			run(b.t, "qemu-img", "convert", "-U", "-f", "raw", "-O", "raw", from, ref)
		}
		w.refs = append(w.refs, ref)
	}
	if err := b.vm.Resume(ctx); err != nil {
		b.t.Fatal(err)
	}
	return w
}

// finish copies and commits.
func (b *bed) finish(w *begun) *image.Manifest {
	b.t.Helper()
	ctx := b.t.Context()
	err := w.Wait(ctx)
	if err == nil {
		err = w.Finish(ctx)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	disks, err := w.Seal(ctx)
	if err != nil {
		b.t.Fatal(err)
	}
	b.seed++
	m, err := storetest.Fill(ctx, w.txn, b.seed, image.WriterOptions{Compress: "none"})
	if err != nil {
		b.t.Fatal(err)
	}
	m.Disks = disks
	for _, d := range disks {
		m.Stats.DiskBytes += d.Volumes[0].Bytes
	}
	if err := w.txn.Commit(ctx, m); err != nil {
		b.t.Fatal(err)
	}
	if err := w.Keep(ctx); err != nil {
		b.t.Fatal(err)
	}
	b.compare(m, w.refs)
	return m
}

// compare holds every disk of a checkpoint against the copy made at its instant.
func (b *bed) compare(m *image.Manifest, refs []string) {
	b.t.Helper()
	for i, d := range m.Disks {
		volume := filepath.Join(b.store.VolumeDir("vm"), d.Volumes[0].Name)
		run(b.t, "qemu-img", "compare", "-f", "qcow2", "-F", "raw", volume, refs[i])
		run(b.t, "qemu-img", "check", "-q", volume)
	}
}

// names lists what is in the block graph, for comparison with what was.
func (b *bed) names() []string {
	b.t.Helper()
	g, err := disk.Read(b.t.Context(), b.vm.QMP)
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	for name := range g.Nodes {
		out = append(out, "node "+name)
	}
	for _, d := range g.Drives {
		out = append(out, "drive "+d.QOMPath+" "+d.Root)
	}
	for _, j := range g.Jobs {
		out = append(out, "job "+j.ID)
	}
	slices.Sort(out)
	return out
}

// bitmaps lists the bitmaps of all nodes.
func (b *bed) bitmaps() []string {
	b.t.Helper()
	g, err := disk.Read(b.t.Context(), b.vm.QMP)
	if err != nil {
		b.t.Fatal(err)
	}
	var out []string
	for name, n := range g.Nodes {
		for _, m := range n.Bitmaps {
			out = append(out, fmt.Sprintf("%s %s recording=%v", name, m.Name, m.Recording))
		}
	}
	slices.Sort(out)
	return out
}

func (b *bed) wantGraph(before []string) {
	b.t.Helper()
	if now := b.names(); !slices.Equal(now, before) {
		b.t.Errorf("the graph was\n%s\nand is\n%s", strings.Join(before, "\n"), strings.Join(now, "\n"))
	}
	var sets []struct {
		FDs []any `json:"fds"`
	}
	if err := b.vm.QMP.Execute(b.t.Context(), "query-fdsets", nil, &sets); err != nil {
		b.t.Error(err)
	}
	for _, s := range sets {
		// QEMU keeps an empty set of what a broken store would not let it close.
		if len(s.FDs) > 0 {
			b.t.Errorf("descriptors left: %v", sets)
		}
	}
}

// newQcow2 makes an image with some content.
func newQcow2(t testing.TB, path, size string, args ...string) string {
	t.Helper()
	run(t, "qemu-img", append(append([]string{"create", "-q", "-f", "qcow2"}, args...), path, size)...)
	run(t, "qemu-io", "-f", "qcow2", "-c", "write -P 7 0 3M", "-c", "write -P 8 5M 70k", path)
	return path
}

// serveNBD exports a file until the test ends.
func serveNBD(t *testing.T, socket, file string) {
	t.Helper()
	// The test's context ends before the machine does.
	cmd := exec.Command("qemu-nbd", "--persistent", "--shared=8", "--format=raw", "--socket="+socket, file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for range 1000 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		<-tick.C
	}
	t.Fatal("qemu-nbd makes no socket")
}

func raw(t testing.TB, path string, bytes int64) string {
	t.Helper()
	data := make([]byte, bytes)
	for i := range data {
		data[i] = byte(i / 511)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func builds(t *testing.T) map[string]guest.QEMU {
	t.Helper()
	q10, err := guest.QEMU10(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return map[string]guest.QEMU{"system": {}, "qemu10": q10}
}

// TestDevices takes two checkpoints of every kind of drive, the second incremental,
// while the device writes.
func TestDevices(t *testing.T) {
	cases := []struct {
		name string
		args func(t *testing.T, dir string) []string
	}{
		{"virtio-blk qcow2", func(t *testing.T, dir string) []string {
			return []string{"-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "8M"), "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		{"virtio-blk raw of odd size", func(t *testing.T, dir string) []string {
			return []string{"-blockdev", "driver=file,node-name=f,filename=" + raw(t, dir+"/a", 8<<20+512*3), "-blockdev", "driver=raw,node-name=n,file=f", "-device", "virtio-blk-pci,drive=n,id=v"}
		}},
		{"virtio-blk on the protocol node", func(t *testing.T, dir string) []string {
			return []string{"-blockdev", "driver=file,node-name=f,filename=" + raw(t, dir+"/a", 8<<20), "-device", "virtio-blk-pci,drive=f,id=v"}
		}},
		{"scsi-hd", func(t *testing.T, dir string) []string {
			return []string{"-device", "virtio-scsi-pci,id=bus", "-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "8M"), "-device", "scsi-hd,drive=d,id=s"}
		}},
		{"ide", func(t *testing.T, dir string) []string {
			return []string{"-drive", "if=ide,format=raw,file=" + raw(t, dir+"/a", 8<<20)}
		}},
		{"usb-storage", func(t *testing.T, dir string) []string {
			return []string{"-device", "qemu-xhci", "-drive", "if=none,id=d,format=raw,file=" + raw(t, dir+"/a", 8<<20), "-device", "usb-storage,drive=d,id=u"}
		}},
		{"floppy", func(t *testing.T, dir string) []string {
			return []string{"-drive", "if=floppy,format=raw,file=" + raw(t, dir+"/a", 1474560)}
		}},
		{"throttle filter", func(t *testing.T, dir string) []string {
			return []string{"-object", "throttle-group,id=g,x-bps-total=200000000", "-blockdev", "driver=qcow2,node-name=n,file.driver=file,file.filename=" + newQcow2(t, dir+"/a", "8M"),
				"-blockdev", "driver=throttle,node-name=th,throttle-group=g,file=n", "-device", "virtio-blk-pci,drive=th,id=v"}
		}},
		{"throttled drive", func(t *testing.T, dir string) []string {
			return []string{"-drive", "if=none,id=d,format=qcow2,throttling.bps-total=200000000,file=" + newQcow2(t, dir+"/a", "8M"), "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		{"small clusters on a backing file", func(t *testing.T, dir string) []string {
			return []string{"-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "8M", "-o", "cluster_size=4k", "-F", "raw", "-b", raw(t, dir+"/base", 6<<20)), "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		{"network storage", func(t *testing.T, dir string) []string {
			serveNBD(t, dir+"/nbd", raw(t, dir+"/a", 8<<20))
			return []string{"-drive", "if=none,id=d,format=raw,file=nbd:unix:" + dir + "/nbd", "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		{"without rights to the store", func(t *testing.T, dir string) []string {
			return []string{"-sandbox", "on,obsolete=deny,spawn=deny,resourcecontrol=deny", "-runas", "nobody", "-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "8M"), "-device", "virtio-blk-pci,drive=d,id=v"}
		}},
		{"iothread", func(t *testing.T, dir string) []string {
			return []string{"-object", "iothread,id=io", "-drive", "if=none,id=d,format=qcow2,file=" + newQcow2(t, dir+"/a", "8M"), "-device", "virtio-blk-pci,drive=d,id=v,iothread=io"}
		}},
	}
	for build, q := range builds(t) {
		for _, c := range cases {
			if build == "qemu10" && strings.HasPrefix(c.name, "without rights") {
				continue // it has no -runas any more
			}
			if build != "qemu10" && c.name == "iothread" {
				continue // refused
			}
			t.Run(build+"/"+c.name, func(t *testing.T) {
				b := newBed(t, q, func(dir string) []string { return c.args(t, dir) })
				before := b.names()
				device := b.sources()[0].Device
				rounds, overlays := 2, c.name != "network storage" && c.name != "without rights to the store"
				if overlays {
					rounds = 3 // by turns: what one method recorded the other continues
				}
				for round := range rounds {
					var change func(*Config)
					if overlays && round == 1 {
						change = b.overlays
					}
					w := b.begin(change)
					b.write(device, "write -P %d 64k 128k", 30+round)
					if err := w.Start(t.Context()); err != nil {
						t.Fatal(err)
					}
					b.write(device, "write -P %d 1000k 100k", 40+round)
					b.write(device, "write -z 512k 64k")
					m := b.finish(w)
					if len(m.Disks) != 1 || len(m.Disks[0].Volumes) != round+1 {
						t.Errorf("disks %+v", m.Disks)
					}
					b.wantGraph(before)
					b.wantNoOverlay()
				}
			})
		}
	}
}
