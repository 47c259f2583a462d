package cow

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// faultCost is the time of a page fault of this process, in nanoseconds.
func faultCost() float64 {
	const pages, rounds = 4096, 40
	mem, err := unix.Mmap(-1, 0, pages*PageBytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return 0
	}
	_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE) // where there are none, all the better
	best := time.Duration(1 << 62)
	for range rounds {
		if err := unix.Madvise(mem, unix.MADV_DONTNEED); err != nil {
			return 0
		}
		begin := time.Now()
		for i := 0; i < len(mem); i += PageBytes {
			mem[i] = 1
		}
		best = min(best, time.Since(begin))
	}
	return float64(best.Nanoseconds()) / pages
}

// BenchmarkOtherProcesses is what a page fault costs a process that is not watched, in
// nanoseconds, without the programs and while they capture another's pages.
func BenchmarkOtherProcesses(b *testing.B) {
	self, err := os.Executable()
	if err != nil {
		b.Fatal(err)
	}
	measure := func() float64 {
		out, err := exec.Command(self, "faults").Output()
		var ns float64
		if _, scanErr := fmt.Sscan(string(out), &ns); err != nil || scanErr != nil || ns == 0 {
			b.Fatalf("%q: %v, %v", out, err, scanErr)
		}
		return ns
	}
	var with, without []float64
	for range b.N {
		without = append(without, measure())
		b.StopTimer()
		bed := newBed(b, memory{}, 64, 1<<20)
		bed.arm()
		b.StartTimer()
		with = append(with, measure())
		b.StopTimer()
		if err := bed.p.Detach(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	median := func(x []float64) float64 { slices.Sort(x); return x[len(x)/2] }
	b.ReportMetric(median(without), "ns/fault-without")
	b.ReportMetric(median(with), "ns/fault-with")
}
