package main

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd/internal/vm/job"
)

// A kernelLog reads the kernel's messages from where it was opened on.
type kernelLog struct {
	fd  int
	bad []string // see read
}

func openKernelLog() (*kernelLog, error) {
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/kmsg: %w", err)
	}
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return nil, fmt.Errorf("seek in /dev/kmsg: %w", err)
	}
	return &kernelLog{fd: fd}, nil
}

// read reads all there is. From the first message on that tells of something
// wrong in the kernel it collects them in bad, a screenful or two.
func (k *kernelLog) read() {
	const enough = 100
	buf := make([]byte, 8192) // a record is at most this long
	for {
		n, err := unix.Read(k.fd, buf)
		if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EPIPE) { // EPIPE: messages were overwritten
			continue
		}
		if err != nil {
			return
		}
		text, ok := job.KernelMessage(string(buf[:n]))
		if ok && len(k.bad) < enough && (len(k.bad) > 0 || job.IsKernelBug(text)) {
			k.bad = append(k.bad, text)
		}
	}
}

// take returns what was bad, and starts anew.
func (k *kernelLog) take() []string {
	k.read()
	bad := k.bad
	k.bad = nil
	return bad
}
