package selfexe

import "os"

// running is the binary of the calling process, whatever has become of its name.
const running = "/proc/self/exe"

// Path is what to start. It is the path by which people know the binary, unless that
// leads to another one by now, which was installed over ours, or to none.
func Path() string {
	named, err := os.Executable()
	if err != nil {
		return running
	}
	return choose(named)
}

func choose(named string) string {
	ours, err := os.Stat(running)
	if err != nil {
		return named
	}
	if there, err := os.Stat(named); err != nil || !os.SameFile(ours, there) {
		return running
	}
	return named
}

// Or is the command line that is given, or the one of the running binary if it is empty.
func Or(given []string) []string {
	if len(given) > 0 {
		return given
	}
	return []string{Path()}
}
