package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// A kernelLog reads the kernel's messages from where it was opened on.
type kernelLog struct {
	fd    int
	bad   []string // see read
	taint uint64   // bits of taintFile that have been seen
}

const taintFile = "/proc/sys/kernel/tainted"

// tainted are the bits that a bad page, a die, a warning and a soft lockup leave.
const tainted = 1<<5 | 1<<7 | 1<<9 | 1<<14

func openKernelLog() (*kernelLog, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/kmsg: %w", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return nil, fmt.Errorf("seek in /dev/kmsg: %w", err)
	}
	k := &kernelLog{fd: fd}
	k.checkTaint(taintFile)
	k.bad = nil // what happened at boot is not the programs'
	return k, nil
}

// checkTaint looks for what is wrong in the kernel without a message that says so.
func (k *kernelLog) checkTaint(name string) {
	text, err := os.ReadFile(name)
	var now uint64
	if err == nil {
		now, err = strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	}
	switch {
	case err != nil:
		k.bad = append(k.bad, "vm: "+err.Error())
	case now&^k.taint&tainted != 0 && len(k.bad) == 0:
		k.bad = append(k.bad, fmt.Sprintf("vm: %s is %d, was %d", name, now, k.taint))
	}
	k.taint |= now
}

// read reads all there is. From the first message on that tells of something
// wrong in the kernel it collects them in bad, a screenful or two.
func (k *kernelLog) read() {
	buf := make([]byte, 8192) // a record is at most this long
	for {
		n, err := unix.Read(k.fd, buf)
		if !k.add(buf[:max(n, 0)], err) {
			return
		}
	}
}

// add takes what a read gave, and reports whether there may be more. Messages
// that could not be read may have told of something wrong too.
func (k *kernelLog) add(record []byte, err error) (more bool) {
	const enough = 100
	text, bad := "", true
	switch err {
	case nil:
		var ok bool
		text, ok = job.KernelMessage(string(record))
		if !ok {
			return true
		}
		bad = job.IsKernelBug(text)
	case unix.EINTR:
		return true
	case unix.EAGAIN: // that was all
		return false
	case unix.EPIPE:
		text = "vm: the kernel has overwritten messages before they were read"
	default:
		text = "vm: read /dev/kmsg: " + err.Error()
	}
	if len(k.bad) < enough && (bad || len(k.bad) > 0) {
		k.bad = append(k.bad, text)
	}
	return err == nil || err == unix.EPIPE
}

// take returns what was bad, and starts anew.
func (k *kernelLog) take() []string {
	k.read()
	k.checkTaint(taintFile)
	bad := k.bad
	k.bad = nil
	return bad
}
