//go:build linux

// Command criu-lazy-pages takes the place of "criu lazy-pages": it serves the
// memory of processes that CRIU restores from images, so that they run before
// their memory is there.
//
//	criu dump -t PID -D IMAGES
//	criu-lazy-pages -D IMAGES -W WORK
//	criu restore -D IMAGES -W WORK --lazy-pages
//
// A page is read from the images when it is touched. When all processes run, the
// others follow in the background, and the command exits when nothing is missing
// any more. Before it listens, it makes sure that the images are complete and
// have nothing that it does not know. They must not change while it runs.
//
// The processes do not survive without it: the kernel takes pages for zeros when
// nobody serves them any more. So nothing but SIGKILL ends it once a restore has
// begun, not even an image that cannot be read: a process that touches such a page
// gets SIGBUS, and the command exits with an error when that process is gone.
//
// It has no counterpart to these options of criu lazy-pages: --page-server, which
// gets pages over the network; --daemon; --auto-dedup.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"os"
)

func main() {
	err := run(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "criu-lazy-pages:", err)
		os.Exit(1)
	}
}

func run(args []string, output io.Writer) error {
	flags := flag.NewFlagSet("criu-lazy-pages", flag.ContinueOnError)
	flags.SetOutput(output)
	var images, work string
	for _, name := range []string{"D", "images-dir"} {
		flags.StringVar(&images, name, ".", "read the images in `DIR`")
	}
	for _, name := range []string{"W", "work-dir"} {
		flags.StringVar(&work, name, "", "listen in `DIR` (default that of the images)")
	}
	ready := flags.Int("status-fd", -1, "write a zero byte to the descriptor `FD`, and close it, when restore can begin")
	delay := flags.Duration("delay", 0, "leave the processes alone for as long before the transfer in the background")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		flags.Usage()
		return fmt.Errorf("unknown argument %q", flags.Arg(0))
	}
	if work == "" {
		work = images
	}
	s := &server{log: log.New(output, "criu-lazy-pages: ", 0), delay: *delay}
	return s.run(images, work, *ready)
}
