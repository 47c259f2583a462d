package image

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image/fsys"
)

const benchBytes = 128 << 20

// sharedMemory is what a fault server's arena is: a mapped memfd.
func sharedMemory(b *testing.B, n int) []byte {
	b.Helper()
	fd, err := unix.MemfdCreate("bench", unix.MFD_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		b.Fatal(err)
	}
	mem, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { unix.Munmap(mem) })
	return mem
}

// guestLike fills memory with pages none of which is zero; every second one
// compresses.
func guestLike(mem []byte) {
	rnd := rand.New(rand.NewSource(1))
	rnd.Read(mem[:1<<20])
	for off := 1 << 20; off < len(mem); off += 1 << 20 {
		copy(mem[off:], mem[:1<<20])
	}
	for off := 0; off < len(mem); off += 8192 {
		copy(mem[off:off+4096], bytes.Repeat([]byte(fmt.Sprintf("%016d", off)), 256))
	}
}

func benchDir(b *testing.B) string {
	if d := os.Getenv("CKAGENT_BENCH_DIR"); d != "" {
		dir, err := os.MkdirTemp(d, "image")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	return b.TempDir()
}

type benchResult struct{ write, total, cpu []time.Duration }

// cpuTime is what this process has used, user and system.
func cpuTime(b *testing.B) time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func median(d []time.Duration) time.Duration {
	sort.Slice(d, func(i, j int) bool { return d[i] < d[j] })
	return d[len(d)/2]
}

// BenchmarkWriterAgainstWrite stores the same bytes in alternation by write(2)
// and by a Writer, each into new files, and reports the ratio of throughputs:
// until the last write returned, and until everything is on the disk; and of the
// processor time up to the last write, which a busy host disturbs least.
func BenchmarkWriterAgainstWrite(b *testing.B) {
	mem := sharedMemory(b, benchBytes)
	guestLike(mem)
	for _, call := range []int{256 << 10, 1 << 20} {
		for _, workers := range []int{1, 2} {
			for _, o := range []WriterOptions{{}, {WritebackBytes: -1}, {Direct: true}, {Key: testKey(b, "x")}} {
				name := fmt.Sprintf("call=%dK/workers=%d/writeback=%v/direct=%v/tags=%v", call>>10, workers, o.WritebackBytes == 0, o.Direct, o.Key != nil)
				b.Run(name, func(b *testing.B) {
					var plain, ours benchResult
					dir := benchDir(b)
					for b.Loop() {
						benchPlain(b, dir, mem, call, workers, &plain)
						benchWriter(b, dir, mem, call, workers, o, &ours)
					}
					mbs := func(d time.Duration) float64 { return benchBytes / 1e6 / d.Seconds() }
					b.ReportMetric(0, "ns/op")
					b.ReportMetric(mbs(median(plain.write)), "write(2)-MB/s")
					b.ReportMetric(mbs(median(ours.write)), "image-MB/s")
					b.ReportMetric(float64(median(plain.write))/float64(median(ours.write)), "ratio")
					b.ReportMetric(float64(median(plain.total))/float64(median(ours.total)), "ratio-durable")
					b.ReportMetric(float64(median(plain.cpu))/float64(median(ours.cpu)), "ratio-cpu")
					b.ReportMetric(float64(median(ours.total).Milliseconds()), "durable-ms")
				})
			}
		}
	}
}

func parallel(b *testing.B, n, call, workers int, f func(worker, off int) error) {
	var wg sync.WaitGroup
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for off := w * call; off < n; off += workers * call {
				if err := f(w, off); err != nil {
					b.Error(err)
					return
				}
			}
		}()
	}
	wg.Wait()
}

func benchPlain(b *testing.B, dir string, mem []byte, call, workers int, r *benchResult) {
	files := make([]*os.File, workers)
	start, cpu := time.Now(), cpuTime(b)
	for i := range files {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("plain", i)))
		if err != nil {
			b.Fatal(err)
		}
		files[i] = f
	}
	parallel(b, len(mem), call, workers, func(w, off int) error {
		_, err := files[w].Write(mem[off : off+call])
		return err
	})
	r.write, r.cpu = append(r.write, time.Since(start)), append(r.cpu, cpuTime(b)-cpu)
	for _, f := range files {
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
	}
	r.total = append(r.total, time.Since(start))
	for _, f := range files {
		f.Close()
		os.Remove(f.Name())
	}
}

func benchWriter(b *testing.B, dir string, mem []byte, call, workers int, o WriterOptions, r *benchResult) {
	dir = filepath.Join(dir, "image")
	if err := os.Mkdir(dir, 0o700); err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	n := uint64(len(mem))
	start, cpu := time.Now(), cpuTime(b)
	w, err := NewWriter(dir, []Block{{Name: "r", UsedBytes: n, TotalBytes: n, PageBytes: 4096}}, o)
	if err != nil {
		b.Fatal(err)
	}
	parallel(b, len(mem), call, workers, func(_, off int) error {
		return w.WritePages(0, uint64(off/4096), mem[off:off+call])
	})
	r.write, r.cpu = append(r.write, time.Since(start)), append(r.cpu, cpuTime(b)-cpu)
	if err := w.WriteDeviceState(bytes.NewReader(nil)); err != nil {
		b.Fatal(err)
	}
	if _, err := w.Finish(context.Background()); err != nil {
		b.Fatal(err)
	}
	r.total = append(r.total, time.Since(start))
}

// BenchmarkWriteZero is the cost of memory that holds nothing.
func BenchmarkWriteZero(b *testing.B) {
	n := uint64(8 << 30)
	b.SetBytes(int64(n))
	for b.Loop() {
		w, err := NewWriter("", []Block{{Name: "r", UsedBytes: n, TotalBytes: n, PageBytes: 4096}}, WriterOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if err := w.WriteZero(0, 0, n/4096); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkCompress is what a codec costs and saves on half-compressible memory.
func BenchmarkCompress(b *testing.B) {
	mem := sharedMemory(b, 64<<20)
	guestLike(mem)
	for _, codec := range []string{"none", "s2", "zstd"} {
		b.Run(codec, func(b *testing.B) {
			b.SetBytes(int64(len(mem)))
			var stored uint64
			for b.Loop() {
				dir := benchDir(b)
				w, err := NewWriter(dir, []Block{{Name: "r", UsedBytes: uint64(len(mem)), TotalBytes: uint64(len(mem)), PageBytes: 4096}}, WriterOptions{Compress: codec})
				if err != nil {
					b.Fatal(err)
				}
				for off := 0; off < len(mem); off += 1 << 20 {
					if err := w.WritePages(0, uint64(off/4096), mem[off:off+1<<20]); err != nil {
						b.Fatal(err)
					}
				}
				stored = w.Progress().StoredBytes
				w.Abort()
				os.RemoveAll(dir)
			}
			b.ReportMetric(float64(stored)/float64(len(mem)), "stored/raw")
		})
	}
}

// benchImage writes an image of n bytes, the first 64 MiB of which hold data.
func benchImage(b *testing.B, n uint64, codec string) string {
	b.Helper()
	dir := benchDir(b)
	mem := make([]byte, 64<<20)
	guestLike(mem)
	w, err := NewWriter(dir, []Block{{Name: "r", UsedBytes: n, TotalBytes: n, PageBytes: 4096}}, WriterOptions{Compress: codec})
	if err != nil {
		b.Fatal(err)
	}
	for off := 0; off < len(mem); off += 1 << 20 {
		if err := w.WritePages(0, uint64(off/4096), mem[off:off+1<<20]); err != nil {
			b.Fatal(err)
		}
	}
	err = w.WriteZero(0, uint64(len(mem)/4096), (n-uint64(len(mem)))/4096)
	if err == nil {
		err = w.WriteDeviceState(bytes.NewReader(make([]byte, 60<<10)))
	}
	if err != nil {
		b.Fatal(err)
	}
	s, err := w.Finish(context.Background())
	if err != nil {
		b.Fatal(err)
	}
	m := testManifest(s)
	m.Hot = nil
	for i := range uint64(4096) {
		m.Hot = append(m.Hot, PageRun{0, i * 4, 3})
	}
	data, err := EncodeManifest(m)
	if err == nil {
		err = fsys.WriteFile(fsys.OS{}, filepath.Join(dir, ManifestName), data)
	}
	if err != nil {
		b.Fatal(err)
	}
	return dir
}

// BenchmarkOpenReader must not grow with the RAM: it is part of the time to
// resume. The manifest has 4096 hot runs.
func BenchmarkOpenReader(b *testing.B) {
	for _, mib := range []uint64{256, 1024, 8192} {
		b.Run(fmt.Sprint(mib, "MiB"), func(b *testing.B) {
			dir := benchImage(b, mib<<20, "none")
			page := make([]byte, 4096)
			for b.Loop() {
				r, err := OpenReader(dir)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := r.ReadPage(0, 5, page); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}

// BenchmarkReadPage compares random single pages (a fault) and runs (prefetch),
// and what mmap would give for the same raw page.
func BenchmarkReadPage(b *testing.B) {
	for _, codec := range []string{"none", "s2", "zstd"} {
		dir := benchImage(b, 256<<20, codec)
		r, err := OpenReader(dir)
		if err != nil {
			b.Fatal(err)
		}
		defer r.Close()
		rnd := rand.New(rand.NewSource(1))
		for _, pages := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/pages=%d", codec, pages), func(b *testing.B) {
				dst := make([]byte, pages*4096)
				b.SetBytes(int64(len(dst)))
				for b.Loop() {
					if _, err := r.ReadRun(0, uint64(rnd.Intn(16384-pages)), dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		if codec != "none" {
			continue
		}
		f, err := os.Open(filepath.Join(dir, "seg-0000"))
		if err != nil {
			b.Fatal(err)
		}
		defer f.Close()
		for _, pages := range []int{1, 64} {
			b.Run(fmt.Sprintf("mmap/pages=%d", pages), func(b *testing.B) {
				mem, err := unix.Mmap(int(f.Fd()), 0, 64<<20, unix.PROT_READ, unix.MAP_SHARED)
				if err != nil {
					b.Fatal(err)
				}
				defer unix.Munmap(mem)
				dst := make([]byte, pages*4096)
				b.SetBytes(int64(len(dst)))
				n := 0
				for b.Loop() {
					if n++; n%256 == 0 { // pages are read once in a restore: keep them cold
						if err := unix.Madvise(mem, unix.MADV_DONTNEED); err != nil {
							b.Fatal(err)
						}
					}
					off := rnd.Intn(16384-pages) * 4096
					copy(dst, mem[off:])
					for p := 0; p < len(dst); p += 4096 {
						Sum(dst[p : p+4096])
					}
				}
			})
		}
	}
}

// BenchmarkVerify is the throughput of a full check.
func BenchmarkVerify(b *testing.B) {
	for _, codec := range []string{"none", "s2", "zstd"} {
		b.Run(codec, func(b *testing.B) {
			r, err := OpenReader(benchImage(b, 64<<20, codec))
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			b.SetBytes(64 << 20)
			for b.Loop() {
				if err := r.Verify(context.Background(), nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkIsZero is the check every page goes through.
func BenchmarkIsZero(b *testing.B) {
	page := make([]byte, 4096)
	b.SetBytes(4096)
	for b.Loop() {
		if !IsZero(page) {
			b.Fatal("not zero")
		}
	}
}
