//go:build !linux

package handoff

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"github.com/go-uffd/uffd"
)

var errUnsupported = fmt.Errorf("handoff: no userfaultfd on %s: %w", runtime.GOOS, errors.ErrUnsupported)

func send(context.Context, *net.UnixConn, *uffd.File, []byte) error { return errUnsupported }
func write(context.Context, *net.UnixConn, []byte) error            { return errUnsupported }

func receive(context.Context, *net.UnixConn, bool, func(io.Reader) error) (*uffd.File, error) {
	return nil, errUnsupported
}

func peerPid(*net.UnixConn) (int, error)       { return 0, errUnsupported }
func openPeer(*net.UnixConn) (*os.File, error) { return nil, errUnsupported }
