package heartbeat

import _ "unsafe" // for go:linkname

// Pin keeps the Go scheduler from taking the thread away from this goroutine,
// until Unpin. A goroutine that has run for 10 ms (and to the scheduler a thread
// inside a bare system call runs) is asked to yield at its next function call;
// if it is locked to its thread, it then waits for some other, ordinary thread to
// send it on, which on a busy host takes many milliseconds.
//
// Between Pin and Unpin nothing may block in the Go sense: no contended mutex, no
// channel operation but close, no ordinary blocking system call. Bare ones are
// fine. The world cannot be stopped meanwhile: a pin is short, or the process
// collects no garbage. Pins nest.
func Pin() { procPin() }

// Unpin ends a Pin.
func Unpin() { procUnpin() }

//go:linkname procPin runtime.procPin
func procPin() int

//go:linkname procUnpin runtime.procUnpin
func procUnpin()
