package track

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// checkProtection tries whether write protection works. Linux 5.10 offers it on
// architectures that do not have it, and then never reports a write.
func checkProtection() error {
	f, err := uffd.New(&uffd.Config{Require: uffd.FeaturePagefaultFlagWP | uffd.FeatureSigbus})
	if err != nil {
		return err
	}
	defer f.Close()
	mem, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(mem)
	mem[0] = 1
	r := uffd.RangeOf(mem)
	if _, err := f.Register(r, uffd.RegisterWP); err != nil {
		return err
	}
	if err := f.WriteProtect(r, uffd.WriteProtectWP); err != nil {
		return err
	}
	zero, err := os.Open("/dev/zero")
	if err != nil {
		return err
	}
	defer zero.Close()
	// With FeatureSigbus a system call that writes there fails.
	if _, err := zero.Read(mem[:1]); err == nil {
		return fmt.Errorf("track: the kernel offers write protection, but it does not work on this architecture: %w", errors.ErrUnsupported)
	}
	return nil
}
