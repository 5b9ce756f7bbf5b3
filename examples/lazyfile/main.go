//go:build linux

// Command lazyfile serves a file as memory to another process, page by page, as
// that process touches it.
//
//	lazyfile [FILE]
//
// The other process, which never opens the file, hashes the memory; lazyfile
// hashes the file, and fails if the two differ. Without FILE it serves its own
// executable.
package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/go-uffd/uffd"
	"github.com/go-uffd/uffd/examples/internal/twin"
	"github.com/go-uffd/uffd/pager"
	"github.com/go-uffd/uffd/source"
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("lazyfile: ")
	path := "/proc/self/exe"
	if len(os.Args) > 1 {
		path = os.Args[1]
	}
	var err error
	if twin.Second() {
		err = hashMemory(path)
	} else {
		err = serve(path, os.Stdout)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// hashMemory is the second process: it has memory of the file's size, and no
// other idea of the file.
func hashMemory(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, roundUp(int(info.Size())), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	f, err := uffd.New(&uffd.Config{Prefer: pager.Events})
	if err != nil {
		return err
	}
	if _, err := f.Register(uffd.RangeOf(mem), uffd.RegisterMissing); err != nil {
		return err
	}
	if err := twin.Send(f, uffd.RangeOf(mem)); err != nil {
		return err
	}
	_, err = fmt.Printf("%x\n", sha256.Sum256(mem[:info.Size()]))
	return err
}

func roundUp(n int) int {
	size := os.Getpagesize()
	return (n + size - 1) / size * size
}

// serve is the first process.
func serve(path string, out io.Writer) error {
	file, err := source.OpenFile(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if file.Size() == 0 {
		return fmt.Errorf("%s is empty", path)
	}
	want, err := hashFile(path)
	if err != nil {
		return err
	}

	answer, stdout, err := os.Pipe()
	if err != nil {
		return err
	}
	defer answer.Close()
	second, err := twin.Start(stdout, path)
	stdout.Close()
	if err != nil {
		return err
	}
	defer second.Release()
	f, mem, err := second.Receive()
	if err != nil {
		return err
	}
	defer f.Close()

	// The file's bytes go straight from the page cache to the other process.
	p := pager.Pager{ErrorHook: func(_ *pager.Client, err error) { log.Print(err) }}
	c, err := p.Attach(f, pager.Region{Range: mem, Source: file})
	if err != nil {
		return err
	}
	defer c.Close()
	pidfd, err := pager.OpenPid(second.Process.Pid)
	if err != nil {
		return err
	}
	defer pidfd.Close()
	c.Watch(pidfd) // to know when the process has ended

	start := time.Now()
	if err := second.Continue(); err != nil {
		return err
	}
	served := make(chan error, 1)
	go func() {
		err := c.Serve(context.Background())
		second.Process.Kill() // if Serve has failed, nobody serves the process any more
		served <- err
	}()
	var sum string
	_, scanErr := fmt.Fscan(answer, &sum)
	waitErr := second.Wait()
	elapsed := time.Since(start)
	if err := errors.Join(<-served, waitErr, scanErr); err != nil {
		return err
	}

	fmt.Fprintf(out, "file    %s\n", want)
	fmt.Fprintf(out, "memory  %s\n", sum)
	fmt.Fprintf(out, "%d faults, %d bytes, %v\n", c.Stats().Missing, file.Size(), elapsed.Round(time.Microsecond))
	if sum != want {
		return errors.New("the hashes differ")
	}
	return nil
}

func hashFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	_, err = io.Copy(hash, file)
	return fmt.Sprintf("%x", hash.Sum(nil)), err
}
