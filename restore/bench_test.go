package restore

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// BenchmarkResume restores a VM lazily, from the command to the running guest, and
// reports the medians of its phases. The time must not follow the memory's size.
func BenchmarkResume(b *testing.B) {
	for _, mib := range []int{256, 2048, 8192} {
		b.Run(fmt.Sprintf("%dMiB", mib), func(b *testing.B) {
			v := vmtest.Start(b, vmtest.Config{MemoryMiB: mib, Guest: vmtest.NoGuest})
			st := testStore(b)
			id := takeCheckpoint(b, v, st, nil)
			v.Kill()
			o := testOptions(b)
			o.Detach = true
			phases := map[string][]int64{}
			var order []string
			for b.Loop() {
				res, err := Run(b.Context(), st, id, o)
				if err != nil {
					b.Fatal(err)
				}
				killRestored(b, res)
				last := int64(0)
				order = order[:0]
				for _, p := range res.Phases {
					phases[p.Name] = append(phases[p.Name], p.AtNS-last)
					order, last = append(order, p.Name), p.AtNS
				}
				phases["resume"] = append(phases["resume"], res.ResumeNS)
				phases["total"] = append(phases["total"], res.CommandToRunningNS)
			}
			for _, name := range append(order, "resume", "total") {
				s := phases[name]
				slices.Sort(s)
				b.ReportMetric(float64(s[len(s)/2])/float64(time.Millisecond), name+"-ms")
			}
		})
	}
}
