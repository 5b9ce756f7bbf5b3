//go:build !linux

package pager

import (
	"errors"
	"net"
	"os/exec"
)

func startProcess(string) (*exec.Cmd, *net.UnixConn, error) { return nil, nil, errors.ErrUnsupported }

func parent() (*net.UnixConn, error) { return nil, errors.ErrUnsupported }

func restart(int) error { return errors.ErrUnsupported }
