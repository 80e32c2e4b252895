"""BatchNorm networks in, NormProp networks out: conversion, calibration, folding."""
