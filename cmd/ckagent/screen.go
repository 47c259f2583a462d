package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// screen is a terminal that shows one frame after another in place.
type screen struct {
	out  io.Writer
	size func() (columns, rows int)
	used bool
}

// newScreen is nil for what is no terminal.
func newScreen(out io.Writer) *screen {
	f, ok := out.(*os.File)
	if !ok || !isTerminal(out) {
		return nil
	}
	return &screen{out: out, size: func() (columns, rows int) {
		ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
		if err != nil || ws.Col == 0 || ws.Row == 0 {
			return 80, 24 // a serial line does not know
		}
		return int(ws.Col), int(ws.Row)
	}}
}

// Control sequences of ECMA-48, which every terminal in use understands.
const (
	clearScreen = "\x1b[2J"
	home        = "\x1b[H"
	clearLine   = "\x1b[K" // from the cursor to the end
	clearBelow  = "\x1b[J"
)

// show puts a frame in the former one's place without clearing that first, which
// would flicker. What does not fit is cut off: a line that wraps would move all below.
func (s *screen) show(frame string) {
	columns, rows := s.size()
	lines := strings.Split(strings.TrimRight(frame, "\n"), "\n")
	if len(lines) >= rows {
		lines = append(lines[:max(0, rows-2)], fmt.Sprintf("... %d lines more", len(lines)-rows+2))
	}
	var b strings.Builder
	if !s.used {
		b.WriteString(clearScreen)
		s.used = true
	}
	b.WriteString(home)
	for _, l := range lines {
		b.WriteString(cut(l, columns) + clearLine + "\r\n")
	}
	b.WriteString(clearBelow)
	_, _ = io.WriteString(s.out, b.String()) // the terminal is gone: nobody to tell
}

// cut shortens a line to so many characters.
func cut(line string, columns int) string {
	if utf8.RuneCountInString(line) <= columns {
		return line
	}
	return string([]rune(line)[:columns])
}
