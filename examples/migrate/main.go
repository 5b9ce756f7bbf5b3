//go:build linux

// Command migrate moves a running process from one machine to another, its memory
// last (post-copy live migration). Both machines have this program:
//
//	there$ migrate -receive ADDRESS
//	here$  migrate -send ADDRESS [-memory MIB] [-steps N]
//	here$  migrate                    # both, on this machine
//
// The process that moves changes its memory at random all the time. After a
// quarter of its steps it stops here, and a few registers are sent. With them it
// goes on there at once: what it touches is fetched, before all else, and the
// rest comes in the background. The source has to stay until everything is
// there, has been compared by checksums, and the process is independent. Then
// -receive waits for the result. Without arguments, the result has to be that of
// a process that never moved.
//
// If the connection fails before the process goes on there, it goes on here. If
// it fails later, there is no whole process any more, as with any post-copy
// migration: -receive kills its part and says why. Nothing ever runs twice, and
// memory that is missing is never zeros.
//
// The connection is neither encrypted nor authenticated, a lost one is not
// resumed, and pages of zeros are sent like others.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/go-uffd/uffd/examples/internal/twin"
)

func main() {
	var err error
	if twin.Second() {
		err = goOn(os.Args[1], os.Args[2])
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		err = run(ctx, os.Args[1:], os.Stdout)
	}
	if errors.Is(err, flag.ErrHelp) {
		os.Exit(2)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "migrate:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("migrate", flag.ContinueOnError)
	receiveAt := flags.String("receive", "", "wait at the TCP `ADDRESS` for a process")
	sendTo := flags.String("send", "", "migrate a process to the TCP `ADDRESS`")
	memory := flags.Int64("memory", 64, "its memory, in `MIB`; what -receive takes at most")
	steps := flags.Uint64("steps", 2_000_000, "of each of its threads")
	if err := flags.Parse(args); err != nil {
		return err
	}
	size := *memory << 20
	switch {
	case flags.NArg() > 0 || *receiveAt != "" && *sendTo != "":
		flags.Usage()
		return errors.New("either -send or -receive, and no arguments")
	case *memory <= 0 || size>>20 != *memory:
		return fmt.Errorf("-memory %d MiB is not possible", *memory)
	case *sendTo != "":
		return send(ctx, *sendTo, size, *steps, out)
	case *receiveAt != "":
		l, err := net.Listen("tcp", *receiveAt)
		if err != nil {
			return err
		}
		_, err = receive(ctx, l, size, out)
		return err
	}
	return demonstrate(ctx, size, *steps, out)
}
