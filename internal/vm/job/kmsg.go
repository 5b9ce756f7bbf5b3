package job

import (
	"regexp"
	"strconv"
	"strings"
)

// KernelMessage returns the text of a record read from /dev/kmsg, and whether
// the kernel wrote it: programs can write there too.
func KernelMessage(record string) (text string, ok bool) {
	head, text, found := strings.Cut(record, ";")
	if !found {
		return "", false
	}
	text, _, _ = strings.Cut(text, "\n") // what follows describes devices
	priority, _, _ := strings.Cut(head, ",")
	n, err := strconv.Atoi(priority)
	const facilities = 8 // the lower three bits are the level
	return text, err == nil && n < facilities
}

// bugs are the beginnings of the messages that report a fault of the kernel.
var bugs = []string{
	"------------[ cut here ]",
	"WARNING: ",
	"BUG: ",
	"watchdog: BUG: ", // soft lockup
	"kernel BUG at ",
	"Oops",
	"Internal error: ",
	"Unable to handle kernel ",
	"general protection fault",
	"UBSAN: ",
}

// died is in the message of every architecture's die, whatever else that says.
var died = regexp.MustCompile(`\[#[0-9]+\]`)

// IsKernelBug reports whether a kernel message tells of a warning, a bug or
// an oops.
func IsKernelBug(text string) bool {
	for _, b := range bugs {
		if strings.HasPrefix(text, b) {
			return true
		}
	}
	return died.MatchString(text)
}
