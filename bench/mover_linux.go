package main

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
)

// moverMain is the counterpart of c/client.c with op=move, which works within one
// process only: a goroutine serves the faults of another. That must not be done
// in earnest (see the documentation of package uffd): here the faults are plain
// loads, there is a processor for either goroutine, and no garbage collector.
func moverMain(args []string) error {
	pages, rounds := 1024, 1
	for _, arg := range args {
		fmt.Sscanf(arg, "pages=%d", &pages)
		fmt.Sscanf(arg, "rounds=%d", &rounds)
	}
	runtime.GOMAXPROCS(2)
	debug.SetGCPercent(-1)
	size := pages * os.Getpagesize()
	mem, err := mapAnonymous(size)
	if err != nil {
		return err
	}
	from, err := mapAnonymous(size)
	if err != nil {
		return err
	}
	f, err := uffd.New(nil)
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(mem), uffd.RegisterMissing); err != nil {
		return err
	}
	failed := make(chan error, 1)
	go func() { failed <- movePages(f, uffd.RangeOf(mem), uffd.RangeOf(from)) }()

	took := make([]time.Duration, 0, pages*rounds)
	var total time.Duration
	wrong := 0
	for range rounds {
		for i := range pages {
			*(*uint64)(unsafe.Pointer(&from[i*os.Getpagesize()])) = uint64(i + 1)
		}
		if err := unix.Madvise(mem, unix.MADV_DONTNEED); err != nil {
			return err
		}
		begin := time.Now()
		for i := range pages {
			before := time.Now()
			word := *(*uint64)(unsafe.Pointer(&mem[i*os.Getpagesize()]))
			took = append(took, time.Since(before))
			if word != uint64(i+1) {
				wrong++
			}
		}
		total += time.Since(begin)
		select {
		case err := <-failed:
			return err
		default:
		}
	}
	slices.Sort(took)
	n := len(took)
	fmt.Println(n, total.Nanoseconds(), took[n/2].Nanoseconds(), took[n*99/100].Nanoseconds(),
		took[n*999/1000].Nanoseconds(), took[n-1].Nanoseconds(), wrong)
	return nil
}

func mapAnonymous(size int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		err = unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
	}
	return mem, err
}

func movePages(f *uffd.File, to, from uffd.Range) error {
	page := uint64(os.Getpagesize())
	for {
		m, err := f.ReadMsg()
		if err != nil {
			return err
		}
		fault, _ := m.Pagefault()
		off := uint64(fault.Addr-to.Start) / page * page
		if _, err := f.Move(to.Start+uffd.Addr(off), uffd.Range{Start: from.Start + uffd.Addr(off), Len: page}, 0); err != nil {
			f.Wake(uffd.Range{Start: to.Start + uffd.Addr(off), Len: page})
		}
	}
}
