package plugins

import (
	"bytes"
	"strings"
	"sync"
	"time"
)

const (
	tailBytes      = 2 << 10
	lineBytes      = 1 << 10
	linesPerSecond = 20
	// floodBytes of output within a second end a program.
	floodBytes = 8 << 20
)

// output is what a program writes: its end is kept for errors, a few lines a second
// go to the log, and too much of it is reported once.
type output struct {
	line  func(string) // may be nil
	flood func()       // called once

	mu      sync.Mutex
	tail    []byte
	partial []byte
	second  time.Time // when the current one began
	bytes   int
	lines   int
	flooded bool
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if now := time.Now(); now.Sub(o.second) > time.Second {
		o.second, o.bytes, o.lines = now, 0, 0
	}
	if o.bytes += len(b); o.bytes > floodBytes && !o.flooded {
		o.flooded = true
		o.flood()
	}
	o.tail = append(o.tail, b[max(0, len(b)-tailBytes):]...)
	o.tail = o.tail[max(0, len(o.tail)-tailBytes):]
	for rest := b; len(rest) > 0; {
		text, after, whole := bytes.Cut(rest, []byte{'\n'})
		if room := lineBytes - len(o.partial); room > 0 {
			o.partial = append(o.partial, text[:min(len(text), room)]...)
		}
		if rest = after; whole {
			o.say()
		}
	}
	return len(b), nil
}

func (o *output) say() {
	text := strings.ToValidUTF8(string(o.partial), "?")
	o.partial = o.partial[:0]
	if o.lines++; o.line != nil && text != "" && o.lines <= linesPerSecond {
		o.line(text)
	}
}

// last is what it said in the end, on one line.
func (o *output) last() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(o.tail), "?")), " ")
}

func (o *output) hasFlooded() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.flooded
}
