package bench

import (
	"bytes"
	"context"
	"io"
	"os"
	"regexp"
	"sort"
	"strconv"
	"sync"
	"time"
)

// reportEvery is how often a guest reports its work, and followEvery how often the
// console is looked at: the error of a time stamp.
const (
	reportEvery = 25 * time.Millisecond
	followEvery = 4 * time.Millisecond
)

// workLog stamps the guest's reports of its work counter with the host's time.
type workLog struct {
	path string
	stop context.CancelFunc
	done chan struct{}

	mu    sync.Mutex
	marks []workMark
}

type workMark struct {
	at    time.Time
	pages float64
}

var workLine = regexp.MustCompile(`^WS w=(\d+) .*\*[0-9a-f]{4}\r?$`)

// followWork follows a console until close.
func followWork(path string) *workLog {
	ctx, stop := context.WithCancel(context.Background())
	w := &workLog{path: path, stop: stop, done: make(chan struct{})}
	go w.follow(ctx)
	return w
}

func (w *workLog) close() {
	w.stop()
	<-w.done
}

func (w *workLog) follow(ctx context.Context) {
	defer close(w.done)
	f, err := os.Open(w.path)
	if err != nil {
		return // no marks: the figure will be absent
	}
	defer f.Close()
	if _, err := f.Seek(0, io.SeekEnd); err != nil {
		return
	}
	tick := time.NewTicker(followEvery)
	defer tick.Stop()
	var rest []byte
	buf := make([]byte, 1<<16)
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		for {
			n, err := f.Read(buf)
			rest = append(rest, buf[:n]...)
			if n == 0 || err != nil {
				break
			}
		}
		now := time.Now()
		for {
			line, tail, ok := bytes.Cut(rest, []byte("\n"))
			if !ok {
				break
			}
			rest = tail
			if m := workLine.FindSubmatch(line); m != nil {
				if v, err := strconv.ParseFloat(string(m[1]), 64); err == nil {
					w.add(now, v)
				}
			}
		}
	}
}

// add keeps the later one of two reports that were found at the same moment.
func (w *workLog) add(at time.Time, pages float64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n := len(w.marks); n > 0 && w.marks[n-1].at.Equal(at) {
		w.marks[n-1].pages = pages
		return
	}
	w.marks = append(w.marks, workMark{at, pages})
}

// between is how many pages the guest wrote from one moment to another; ok is
// false if its reports do not cover both.
func (w *workLog) between(from, to time.Time) (pages float64, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a, ok1 := pagesAt(w.marks, from)
	b, ok2 := pagesAt(w.marks, to)
	return b - a, ok1 && ok2
}

// pagesAt interpolates between the two reports around a moment.
func pagesAt(marks []workMark, t time.Time) (float64, bool) {
	i := sort.Search(len(marks), func(i int) bool { return marks[i].at.After(t) })
	if i == 0 || i == len(marks) {
		return 0, false
	}
	a, b := marks[i-1], marks[i]
	share := float64(t.Sub(a.at)) / float64(b.at.Sub(a.at))
	return a.pages + share*(b.pages-a.pages), true
}
