package main

import "errors"

func profile([]string) error { return errors.New("later") }
