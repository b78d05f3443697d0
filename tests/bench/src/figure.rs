//! A measured figure, and how it is shown.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// One row of the report.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: &'static str,
    /// What was measured; the median where there were several runs, the largest where there are several machines.
    pub value: f64,
    /// Of `value` and `baseline`.
    pub unit: &'static str,
    /// The same work without Kubernest, measured in the same run.
    pub baseline: Option<f64>,
    /// `value` over `baseline`.
    pub ratio: Option<f64>,
    /// The most that `ratio`, or without a baseline `value`, should be.
    pub goal: Option<f64>,
}

impl Figure {
    /// A figure that stands for itself.
    pub fn alone(name: &'static str, value: f64, unit: &'static str, goal: Option<f64>) -> Self {
        Self {
            name,
            value,
            unit,
            baseline: None,
            ratio: None,
            goal,
        }
    }

    /// A figure that means something next to its baseline.
    pub fn against(name: &'static str, value: f64, unit: &'static str, baseline: f64, goal: f64) -> Self {
        Self {
            name,
            value,
            unit,
            baseline: Some(baseline),
            ratio: Some(value / baseline),
            goal: Some(goal),
        }
    }

    /// A figure next to its baseline, without a goal.
    pub fn beside(name: &'static str, value: f64, unit: &'static str, baseline: f64) -> Self {
        Self {
            goal: None,
            ..Self::against(name, value, unit, baseline, 0.0)
        }
    }

    fn verdict(&self) -> &'static str {
        match self.goal {
            None => "",
            Some(goal) if self.ratio.unwrap_or(self.value) <= goal => "met",
            Some(_) => "missed",
        }
    }
}

/// The middle of what was measured.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get((values.len() - 1) / 2)?;
    Some(f64::midpoint(lower, upper))
}

/// The value that this part of what was measured does not exceed (nearest rank).
pub fn percentile(mut values: Vec<f64>, part: f64) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (part * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied()
}

/// Prints the table and writes the list as JSON.
pub fn report(figures: &[Figure], file: &Path) -> Result<()> {
    let number = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2}"));
    println!(
        "\n{:<24} {:>10} {:<12} {:>10} {:>7} {:>7}",
        "figure", "value", "unit", "baseline", "ratio", "goal"
    );
    for figure in figures {
        println!(
            "{:<24} {:>10.2} {:<12} {:>10} {:>7} {:>7} {}",
            figure.name,
            figure.value,
            figure.unit,
            number(figure.baseline),
            number(figure.ratio),
            number(figure.goal),
            figure.verdict()
        );
    }
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let text = serde_json::to_string_pretty(figures)?;
    std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    println!("\nwritten to {}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unit_median_is_the_middle_or_between_the_two_middles() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 4.0]), Some(4.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 9.0]), Some(3.0));
    }

    #[test]
    fn unit_percentile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=20).map(f64::from).collect();
        assert_eq!(percentile(values.clone(), 0.5), Some(10.0));
        assert_eq!(percentile(values, 0.95), Some(19.0));
        assert_eq!(percentile(vec![], 0.5), None);
    }

    #[test]
    fn unit_a_goal_is_of_the_ratio_where_there_is_one() {
        assert_eq!(Figure::against("x", 110.0, "s", 100.0, 1.15).verdict(), "met");
        assert_eq!(Figure::against("x", 120.0, "s", 100.0, 1.15).verdict(), "missed");
        assert_eq!(Figure::alone("x", 91.0, "MiB", Some(90.0)).verdict(), "missed");
        assert_eq!(Figure::alone("x", 91.0, "MiB", None).verdict(), "");
    }
}
